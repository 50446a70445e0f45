"""Text-Guided Video Masked Autoencoder (ECCV 2024) in one file.

A video MAE that hides the cubes which CLIP finds most similar to the video's caption, and that can
also align the mean of what stays visible with the caption by a contrastive loss.

    torchrun train.py --mask tgm --vt      # pre-train on the toy world: no download, under 5 minutes
                                           # on 2 CPU cores; the MAE loss ends near 0.8

The file follows one clip from the video file to the loss, a section a step:

    Config -> Reading -> Manifest -> Augmentation -> Cubes -> Maskers -> CLIP -> Transformer -> Losses -> TGMAE
           -> Weights in and out -> Runs

Each section can be lifted out: its banner names what it needs. The method is Augmentation to TGMAE;
what stands before and after them serves the scripts, and can be left for later.

Shapes, the same letters everywhere:
    B batch    T,H,W frames, height, width    C = 3    S = image_size
    t,h,w the grid of cubes: t = T/tubelet_size, h = H/patch_size,
    w = W/patch_size (2 and 16 in VideoMAE)
    N = t*h*w cubes, Nv of them visible,
    Nm masked    P = tubelet_size*patch_size**2*3 values in a cube
    D embed_dim    Dd decoder_embed_dim    E text_dim

A mask is (B,N) bool and True means MASKED, everywhere.
"""

import argparse
import atexit
import contextlib
import gc
import importlib.metadata
import itertools
import json
import math
import multiprocessing as mp
import os
import pickle
import signal
import stat
import sys
import time
import urllib.error
import urllib.request
import warnings
import zipfile
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

# =================================================================================================
# Config: every size of the model, and the presets.
# Needs: dataclass, fields. Paper: 4.2; presets: VideoMAE (Tong et al. 2022), modeling_pretrain.py.
# =================================================================================================


@dataclass(frozen=True)
class Config:
    """Sizes of the model (4.2). An impossible value is a ValueError that prints it."""

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    in_chans: int = 3
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    decoder_embed_dim: int = 384
    decoder_depth: int = 4
    decoder_num_heads: int = 6
    norm_pix_loss: bool = True  # the target is each cube normalised by its own mean and std
    text_dim: int = 512
    temperature: float = 0.07  # of InfoNCE; the paper does not give it
    layer_norm_eps: float = 1e-6
    drop_path: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("drop_path", "norm_pix_loss") and not value > 0:
                raise ValueError(f"{field.name}={value}: must be positive")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: must be in [0, 1)")
        for whole, part in (
            ("image_size", "patch_size"),
            ("num_frames", "tubelet_size"),
            ("embed_dim", "num_heads"),
            ("decoder_embed_dim", "decoder_num_heads"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{whole}={getattr(self, whole)} is not divisible by "
                    f"{part}={getattr(self, part)}"
                )

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t,h,w): how many cubes along time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def num_patches(self) -> int:
        """N = t*h*w."""
        t, h, w = self.grid
        return t * h * w

    @property
    def patch_dim(self) -> int:
        """P: values in one cube."""
        return self.tubelet_size * self.patch_size**2 * self.in_chans


def _preset(width, depth, heads, decoder_width, decoder_depth, decoder_heads, **other):
    return Config(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        decoder_embed_dim=decoder_width,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_heads,
        **other,
    )


PRESETS = {
    "toy": _preset(128, 4, 4, 96, 2, 3, image_size=64, patch_size=8, num_frames=4, text_dim=64),
    "small": _preset(384, 12, 6, 192, 4, 3),
    "base": _preset(768, 12, 12, 384, 4, 6),  # the paper's backbone
    "large": _preset(1024, 24, 16, 512, 12, 8),
    "huge": _preset(1280, 32, 16, 640, 12, 8),
}

# =================================================================================================
# Reading: video file -> frames (T,H,W,3) uint8 [+ motion (T,H/8,W/8)], one decode for both. Needs:
# av, VideoReformatter, contextlib, gc, itertools, math, os, stat, warnings, NamedTuple, numpy as
# np, torch, torch.nn.functional as F. A frame's number is its rank in order of presentation.
# Motion: Fan et al., MGM (ICCV 2023).
# =================================================================================================

MOTION_CELL = 8  # pixels: the codec's smallest block
MAX_PIXELS = 8192 * 4320  # of a frame; a broken header may claim anything


class VideoError(ValueError):
    """A video that cannot be read. The message is one line that names the file."""


class NoMotionVectors(UserWarning):
    """The codec exported no motion vectors, and the difference of frames stands in for them."""


class VideoInfo(NamedTuple):
    """What probe_video finds."""

    frames: int
    fps: float
    size: tuple[int, int]  # (height, width) as shown, so after rotation


class _Index(NamedTuple):
    pts: np.ndarray | None  # (frames,) sorted; None if the file has no usable ones
    keys: np.ndarray  # numbers of the key frames, sorted
    frames: int
    fps: float
    time_base: float  # seconds in a unit of pts


class Video(NamedTuple):
    """A video file that is open, see open_video."""

    path: str
    container: av.container.InputContainer
    stream: av.VideoStream
    index: _Index
    motion: bool


_PYAV = int(av.__version__.split(".")[0])
# Titles that are not UTF-8: PyAV 19 replaces odd bytes by itself, and has no such argument.
_ODD_TITLES = {"metadata_errors": "replace"} if _PYAV < 19 else {}


@contextlib.contextmanager
def _open_stream(path, motion):
    """Yields (container, best video stream); whatever libav finds wrong becomes a VideoError."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe or a device might never end
            raise VideoError(f"{path}: not a file")
        # "file:" keeps libav from taking a name such as http:... for a URL.
        with av.open(f"file:{path}", **_ODD_TITLES) as container:
            stream = container.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise VideoError(f"{path}: no video stream that can be decoded")
            if stream.width * stream.height > MAX_PIXELS:
                raise VideoError(f"{path}: {stream.width}x{stream.height} pixels, larger than 8K")
            # Loaders run a process a core; and with several threads in one decoder the number of
            # motion vectors changes from run to run.
            stream.codec_context.thread_count = 1
            # Set before the first frame is decoded.
            options = {"flags2": "+export_mvs"} if motion else {}
            stream.codec_context.options = options | {"max_pixels": str(MAX_PIXELS)}
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error


def _demux(container, stream):
    # PyAV's generator leaks memory when it is left before its end and not closed.
    return contextlib.closing(container.demux(stream))


def _scan(path, container, stream):
    # Headers lie about the number of frames (Matroska says 0), so the packets are counted,
    # undecoded.
    packets = [
        (packet.pts, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard  # edit lists discard packets
    ]
    if not packets:
        raise VideoError(f"{path}: no frames")
    fps, time_base = float(stream.average_rate or 0), float(stream.time_base or 0)
    pts, is_key = zip(*packets)
    # Times of decoding alone, as AVI has them, are of no use: frames are then counted while
    # decoding.
    unordered = container.format.name == "avi" and stream.codec_context.has_b_frames
    if unordered or None in pts or len(set(pts)) < len(pts):
        return _Index(None, np.empty(0, int), len(packets), fps, time_base)
    order = np.argsort(pts)
    return _Index(
        np.array(pts)[order], np.flatnonzero(np.array(is_key)[order]), len(packets), fps, time_base
    )


_INDICES = {}  # of files met before: the clips of an hour-long one need not scan it each
MAX_INDICES = 4096


@contextlib.contextmanager
def open_video(path, *, motion=False):
    """Opens a video file for frame_range and read_clip, which take it in place of a path. Opening
    costs as much as decoding ten frames, so it is worth doing once. motion: as in read_clip."""
    if isinstance(path, Video):
        yield path
        return
    with _open_stream(path, motion) as (container, stream):
        status = os.stat(path)
        key = str(path), status.st_size, status.st_mtime_ns
        if key not in _INDICES:
            if len(_INDICES) == MAX_INDICES:
                del _INDICES[next(iter(_INDICES))]  # the oldest
            _INDICES[key] = _scan(path, container, stream)
        yield Video(str(path), container, stream, _INDICES[key], motion)


def frame_range(path, start=None, end=None) -> tuple[int, int]:
    """Numbers [first, stop) of the frames shown between `start` and `end`, in seconds from the
    first frame; all by default. path: a file, or a Video from open_video. VideoError if no frame
    lies between."""
    with open_video(path) as video:
        index = video.index
    if index.pts is None:  # no timestamps: the frame rate has to do
        times = np.arange(index.frames) / (index.fps or 1)
    else:
        times = (index.pts - index.pts[0]) * index.time_base
    first = 0 if start is None else int(np.searchsorted(times, start - 1e-6))
    stop = len(times) if end is None else int(np.searchsorted(times, end - 1e-6))
    if first >= stop:
        raise VideoError(f"{video.path}: no frame between start={start} s and end={end} s")
    return first, stop


def clip_indices(first, stop, num_frames, stride, *, generator=None) -> list[int]:
    """num_frames numbers, `stride` apart, from a random place in [first, stop).

    A video shorter than num_frames*stride repeats its last frame, much as in VideoMAE's
    kinetics.py."""
    span = stop - first - num_frames * stride
    start = first + int(torch.randint(max(0, span) + 1, (), generator=generator))
    return [min(start + i * stride, stop - 1) for i in range(num_frames)]


def _runs(keys, frames):
    """Cuts frame numbers into runs, each decoded from one key frame; a new run begins where a seek
    to a later key frame saves decoding. -> [(key frame, [frame, ...]), ...]."""
    runs = []
    for number in sorted(set(frames)):
        before = keys[: np.searchsorted(keys, number, side="right")]
        key = int(before[-1]) if len(before) else 0
        if not runs or key > runs[-1][1][-1] + 1:
            runs.append((key, []))
        runs[-1][1].append(number)
    return runs


def _number(index, frame):
    """The number of a decoded frame, None if no packet announced it."""
    if frame.pts is None:
        return None
    number = int(np.searchsorted(index.pts, frame.pts))
    return number if number < index.frames and index.pts[number] == frame.pts else None


# Codecs in which libav can leave out frames that nothing refers to. (An HEVC frame that says so of
# itself may still be referred to by those of a higher temporal layer.)
_SKIPS = {"h264", "mpeg4"}


def _packets(video, key, number):
    """Packets from key frame `key` on, or from an earlier one, from which frame `number` can be
    decoded; none if no seek lands early enough."""
    pts = video.index.pts
    for target in (
        number,
        key,
    ):  # the first may land on a later key frame, where frames are reordered
        video.container.seek(int(pts[target]), stream=video.stream)
        with _demux(video.container, video.stream) as packets:
            first = next(packets)
            if first.pts is not None and first.pts <= pts[key]:
                yield first
                yield from packets
                return


def _decode(video, frames):
    """Yields (number, frame) for the frames, and for those that had to be decoded on the way to
    them."""
    codec, index = video.stream.codec_context, video.index
    if index.pts is None:
        return
    for key, run in _runs(index.keys, frames):
        awaited = set(index.pts[run].tolist())
        for packet in _packets(video, key, run[0]):
            if codec.name in _SKIPS:
                codec.skip_frame = "DEFAULT" if packet.pts in awaited else "NONREF"
            awaited.discard(packet.pts)
            decoded = packet.decode()
            if (
                not awaited and packet.size
            ):  # all that the run needs is in: flush what the decoder holds back
                decoded += codec.decode(None)
            for frame in decoded:
                if (number := _number(index, frame)) is not None:
                    yield number, frame
            if not awaited:
                break


def _decode_from_start(video, frames):
    """Yields (number, frame) for every frame up to the last of `frames`, in a decoder of its
    own."""
    with (
        _open_stream(video.path, video.motion) as (container, stream),
        _demux(container, stream) as packets,
    ):
        decoded = (packet.decode() for packet in packets)
        for count, frame in enumerate(itertools.chain.from_iterable(decoded)):
            number = count if video.index.pts is None else _number(video.index, frame)
            if number is not None:
                yield number, frame
                if number >= frames[-1]:
                    return


def probe_video(path) -> VideoInfo:
    """Frame count, frames per second and (height, width) of a video; decodes its first frame.

    Raises VideoError if there is no video stream or no frame that can be decoded."""
    with open_video(path) as video:
        for _, frame in _decode_from_start(video, [0]):
            turned = frame.rotation % 180 != 0
            size = (frame.width, frame.height) if turned else (frame.height, frame.width)
            return VideoInfo(video.index.frames, video.index.fps, size)
    raise VideoError(f"{path}: no frame that can be decoded")


# PyAV scales in as many threads as there are cores (since 17), and keeps them for the next frame
# (since 19), for which a loader process that is forked in between would wait for ever. So: one
# thread, and scalers of our own.
_ONE_THREAD = {"threads": 1} if _PYAV >= 17 else {}


def _to_rgb(frame, size, scalers):
    rotation = frame.rotation
    if frame.format.components[0].bits > 8:  # straight to rgb24 swscale is off by up to 3 levels
        frame = scalers[0].reformat(frame, format="yuv420p", **_ONE_THREAD)
    height, width = size
    rgb = scalers[1].reformat(frame, width, height, "rgb24", **_ONE_THREAD).to_ndarray()
    return np.rot90(rgb, round(rotation / 90))  # the metadata's rotation is not applied by itself


def _block_motion(frame, rows, cols):
    """Length of a frame's motion vectors in pixels, (rows,cols) cells of 8x8 pixels, NaN where
    there is none; None if the frame has none at all, as key frames."""
    data = frame.side_data.get("MOTION_VECTORS")
    if not data:
        return None
    v = data.to_ndarray()
    length = np.hypot(v["motion_x"], v["motion_y"]) / v["motion_scale"]
    # The cell of a block's upper left corner (dst is its centre), on a plane with two more cells on
    # each side, where blocks go that lie outside. A block of 16 covers two cells, one of 8 covers
    # one.
    y = ((v["dst_y"] - v["h"] // 2) // MOTION_CELL + 2).clip(0, rows + 2)
    x = ((v["dst_x"] - v["w"] // 2) // MOTION_CELL + 2).clip(0, cols + 2)
    plane = rows + 4, cols + 4
    cell = y.astype(int) * plane[1] + x
    tall, wide = v["h"] > MOTION_CELL, v["w"] > MOTION_CELL
    both = tall & wide
    cell = np.concatenate([cell, cell[wide] + 1, cell[tall] + plane[1], cell[both] + plane[1] + 1])
    length = np.concatenate([length, length[wide], length[tall], length[both]])
    with np.errstate(invalid="ignore"):  # two in a B-block: the mean
        motion = np.bincount(cell, length, math.prod(plane)) / np.bincount(
            cell, minlength=math.prod(plane)
        )
    motion = motion.reshape(plane)[2:-2, 2:-2].astype(np.float32)
    return np.rot90(motion, round(frame.rotation / 90))


def _fill_missing(fields):
    """Fields (h',w') with gaps, or None, one a frame, not all None -> (F,h',w'). A NaN cell takes
    the value of the nearest frame that has one (the later of two: a key frame often opens a new
    shot), 0 where none has."""
    empty = np.full_like(next(field for field in fields if field is not None), np.nan)
    motion = np.stack([empty if field is None else field for field in fields])
    gaps = np.isnan(motion).any(0)
    known = ~np.isnan(motion[:, gaps])  # (F, cells with a gap)
    last = len(motion) - 1
    number = np.arange(last + 1)[:, None]
    before = np.maximum.accumulate(np.where(known, number, -2 * last - 2))
    after = np.minimum.accumulate(np.where(known, number, 3 * last + 3)[::-1])[::-1]
    nearest = np.where(number - before < after - number, before, after).clip(0, last)
    motion[:, gaps] = np.nan_to_num(np.take_along_axis(motion[:, gaps], nearest, axis=0))
    return motion


def _frame_difference(frames):
    """(T,H,W,3) uint8 -> (T,h',w'): mean absolute difference to the frame before, in grey
    levels."""
    grey = frames.float().mean(-1)
    change = (grey[1:] - grey[:-1]).abs() if len(grey) > 1 else torch.zeros_like(grey)
    change = torch.cat([change[:1], change])[: len(grey)]
    return F.avg_pool2d(change[:, None], MOTION_CELL, ceil_mode=True)[:, 0]


def _read_frames(path, decoded, wanted, motion):
    """From pairs (number, frame) -> {number: RGB} and, with motion, {number: motion field or None}
    of those that are wanted. VideoError if one of them, or one on the way to them, is damaged."""
    rgb, fields, size, scalers = {}, {}, None, (VideoReformatter(), VideoReformatter())
    for number, frame in decoded:
        if frame.is_corrupt:  # what follows refers to it
            raise VideoError(f"{path}: frame {number} is damaged")
        size = size or (frame.height, frame.width)  # should it change: as the first
        if number in wanted:
            rgb[number] = _to_rgb(frame, size, scalers)
            if motion:
                fields[number] = _block_motion(frame, *(-(-side // MOTION_CELL) for side in size))
    return rgb, fields


def read_clip(path, frames, *, motion=False):
    """Reads the frames with the given numbers (sorted, repeats allowed), all in one decode. path: a
    file, or a Video from open_video.

    Returns frames (T,H,W,3) uint8; with motion=True (frames, motion): motion (T,H/8,W/8) float32,
    rounded up, is the length of the codec's motion vectors in pixels of the source. A block without
    one borrows from the nearest of the frames that has one. If none of them has (HEVC, VP9 and AV1
    export none) it is the absolute difference of frames instead, and a NoMotionVectors warning.
    Raises ValueError for a number out of range, VideoError for a file that cannot be read."""
    with open_video(path, motion=motion) as video:
        path, index, frames = video.path, video.index, list(frames)
        if not frames or frames != sorted(frames) or frames[0] < 0 or frames[-1] >= index.frames:
            raise ValueError(
                f"{path}: frame numbers {frames}: must be sorted and in 0..{index.frames - 1}"
            )
        if motion and not video.motion:
            raise ValueError(f"{path}: motion of a video that was opened without motion=True")
        # If a seek landed too late, frames are missing: then all is decoded from the start.
        for decode in (_decode, _decode_from_start):
            rgb, fields = _read_frames(path, decode(video, frames), set(frames), motion)
            if rgb.keys() == set(frames):
                break
        else:
            raise VideoError(f"{path}: frame {min(set(frames) - rgb.keys())} cannot be decoded")
    clip = torch.from_numpy(np.stack([rgb[number] for number in frames]))
    if not motion:
        return clip
    gc.collect(1)  # in PyAV a frame and its side data hold each other: they would pile up
    if any(field is not None for field in fields.values()):
        return clip, torch.from_numpy(_fill_missing([fields[number] for number in frames]))
    warnings.warn(
        NoMotionVectors(f"{path}: no motion vectors, frame differences instead"), stacklevel=2
    )
    unique = sorted(rgb)
    change = _frame_difference(torch.from_numpy(np.stack([rgb[number] for number in unique])))
    return clip, change[[unique.index(number) for number in frames]]


# =================================================================================================
# Manifest: what is known of the clips: records of a manifest, and text maps, which captions.py
# makes. Needs: json, zipfile, NamedTuple, Path, numpy as np, torch.
# =================================================================================================


class TextMap(NamedTuple):
    """What CLIP says of a clip, computed once: see captions.py maps. h'*w' patches in a frame."""

    similarity: torch.Tensor  # (captions,F,h',w') cosine of every patch and every caption
    frames: torch.Tensor  # (F,) their numbers in the file
    text: torch.Tensor  # (captions,E) unit vectors
    clip: str  # model, weights, and the first digits of the weights' SHA-256
    size: tuple[int, int]  # (height, width) of the source
    resized: tuple[int, int]  # as CLIP saw it: h'*patch_size, w'*patch_size
    patch_size: int


def read_map(path, captions, clip=None) -> TextMap:
    """Reads a text map (.npz without pickles). Raises ValueError if it is broken, or was made of
    other captions, or (where `clip` is given) by another CLIP."""
    again = "python captions.py maps makes it anew"
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = TextMap(
                *(torch.from_numpy(file[name]) for name in ("similarity", "frames", "text")),
                str(file["clip"]),
                tuple(file["source_size"].tolist()),
                tuple(file["resized_size"].tolist()),
                int(file["patch_size"]),
            )
            made_of = file["captions"].tolist()
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: not a whole text map ({error or type(error).__name__}); {again}"
        ) from error
    if made_of != captions:
        raise ValueError(
            f"{path}: a text map of other captions ({made_of}, now {captions}); {again}"
        )
    if clip not in (None, saved.clip):
        raise ValueError(
            f"{path}: a text map made with CLIP {saved.clip}, not {clip}; {again}, with --force"
        )
    return saved


def read_manifest(path, split=None):
    """Records of a manifest (JSON lines, one clip each) as dicts; with `split`, those of that split
    and those that name none. Adds `path` and `map_path`: `video` and `maps` with the manifest's
    folder in front.

    Raises ValueError that names file and line for a line that is not such a record."""
    path, records = Path(path), []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a manifest: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error}): {line[:60]}") from error
        if not isinstance(record, dict) or not isinstance(record.get("video"), str):
            raise ValueError(f'{path}:{number}: no "video" in {line[:60]}')
        if not isinstance(record.get("maps", ""), str):
            raise ValueError(f"{path}:{number}: maps must be a path, or absent: {record['maps']!r}")
        captions = record.get("captions", [])
        if not isinstance(captions, list) or not all(
            isinstance(c, str) and c.strip() for c in captions
        ):
            raise ValueError(
                f"{path}:{number}: captions must be a list of non-empty texts, or absent: "
                f"{captions!r}"
            )
        if split is None or record.get("split", split) == split:
            paths = {"path": str(path.parent / record["video"])}
            paths |= {"map_path": str(path.parent / record["maps"])} if record.get("maps") else {}
            records.append(record | paths)
    if not records:
        raise ValueError(f"{path}: no clips" + (f" of split {split!r}" if split else ""))
    return records


# =================================================================================================
# Augmentation: one crop and flip for frames, motion and text maps alike.
# Needs: NamedTuple, torch, torch.nn.functional as F, torchvision.transforms.v2.functional as TF.
# Paper: 4.2 and Table 8; the crop is VideoMAE's GroupMultiScaleCrop.
# =================================================================================================

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Crop(NamedTuple):
    """A box in pixels of the source, and whether it is mirrored."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def multi_scale_crop(size, *, flip=True, scales=(1, 0.875, 0.75, 0.66), generator=None) -> Crop:
    """VideoMAE's GroupMultiScaleCrop: a random box in a frame of `size` (height, width), in pixels
    of the source. Its sides are neighbours in `scales` times the short side, at one of 13 places
    (corners, centre, and between); mirrored half the time."""

    def draw(count):
        return int(torch.randint(count, (), generator=generator))

    sides = [int(min(size) * scale) for scale in scales]
    pairs = [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1]
    height, width = pairs[draw(len(pairs))]
    places = [
        (y, x) for y in range(5) for x in range(5) if (y % 2 == x % 2)
    ]  # quarters of the slack
    y, x = places[draw(len(places))]
    top, left = y * ((size[0] - height) // 4), x * ((size[1] - width) // 4)
    return Crop(top, left, height, width, flip and draw(2) == 1)


def crop_frames(frames, crop, size):
    """(T,H,W,3) uint8 -> (3,T,size,size) uint8: cut, resized bilinearly with antialiasing,
    mirrored."""
    video = TF.resized_crop(
        frames.permute(0, 3, 1, 2), crop.top, crop.left, crop.height, crop.width, [size, size]
    )  # (T,3,size,size)
    video = video.flip(-1) if crop.flip else video
    return video.transpose(0, 1).contiguous()  # (3,T,size,size)


def area_weights(cells, out, start, stop):
    """(out,cells): the share of each of `cells` input cells in each of `out` equal parts of the
    span [start, stop), which is given in input cells and lies within them. Rows sum to 1."""
    edges = torch.linspace(start, stop, out + 1, dtype=torch.float64)
    low, high, left = edges[:-1, None], edges[1:, None], torch.arange(cells)
    overlap = (torch.minimum(high, left + 1) - torch.maximum(low, left)).clamp(min=0)
    return (overlap / overlap.sum(1, keepdim=True)).float()


def crop_motion(motion, crop, grid, cell=8):
    """(T,h',w') motion of the whole frame -> (T,h,w) of the crop, each cell's mean by area."""
    _, h, w = grid
    rows = area_weights(motion.shape[-2], h, crop.top / cell, (crop.top + crop.height) / cell)
    cols = area_weights(motion.shape[-1], w, crop.left / cell, (crop.left + crop.width) / cell)
    cropped = rows @ motion @ cols.T  # (h,h') @ (T,h',w') @ (w',w) = (T,h,w)
    return cropped.flip(-1) if crop.flip else cropped


def crop_map(similarity, crop, size, grid):
    """(t,h',w') text similarity of whole frames of `size` (height, width) -> (t,h,w) of the crop:
    the value at the centre of each of its patches, bilinear between cells."""
    _, h, w = grid
    y = 2 * (crop.top + (torch.arange(h) + 0.5) * crop.height / h) / size[0] - 1
    x = 2 * (crop.left + (torch.arange(w) + 0.5) * crop.width / w) / size[1] - 1
    centres = torch.stack(
        torch.meshgrid(y, x, indexing="ij")[::-1], -1
    )  # (h,w,2): x and y in -1..1
    cropped = F.grid_sample(
        similarity[None].float(), centres[None], padding_mode="border", align_corners=False
    )
    cropped = cropped[0]  # (t,h,w)
    return cropped.flip(-1) if crop.flip else cropped


def map_scores(text_map, caption, frames, crop, size, grid):
    """Scores (t,h,w) of a crop from a TextMap, for its caption of that number: of the stored frame
    that is nearest to each of `frames`, the t tubelets' first ones. size: (height, width) that the
    crop is of."""
    nearest = (text_map.frames[:, None] - torch.tensor(frames)).abs().argmin(0)  # (t,)
    return crop_map(text_map.similarity[caption, nearest], crop, size, grid)


def normalize(video):
    """(B,3,T,H,W) uint8 -> float32 with ImageNet's mean and std taken out."""
    mean, std = (
        video.new_tensor(v, dtype=torch.float32).view(3, 1, 1, 1)
        for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (video.float() / 255 - mean) / std


# =================================================================================================
# Cubes: video <-> cubes, and picking some of them.
# Needs: torch. Paper: 3.1, equation (1).
# =================================================================================================


def patchify(video, patch_size, tubelet_size):
    """(B,C,T,H,W) -> (B,N,P), before equation (1). A cube's values: (frame, row, column, channel),
    as in VideoMAE. ValueError if the video does not divide into cubes."""
    B, C, T, H, W = video.shape
    if T % tubelet_size or H % patch_size or W % patch_size:
        raise ValueError(
            f"video of {T}x{H}x{W} (frames x height x width) does not divide into cubes of "
            f"{tubelet_size}x{patch_size}x{patch_size}"
        )
    t, h, w = T // tubelet_size, H // patch_size, W // patch_size
    x = video.reshape(B, C, t, tubelet_size, h, patch_size, w, patch_size)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, t,h,w, frame,row,column, C)
    return x.reshape(B, t * h * w, tubelet_size * patch_size**2 * C)  # (B,N,P)


def unpatchify(patches, grid, patch_size, tubelet_size):
    """(B,N,P) -> (B,C,T,H,W): the exact inverse of patchify. ValueError if N or P do not fit the
    sizes."""
    (B, N, P), (t, h, w) = patches.shape, grid
    C, rest = divmod(P, tubelet_size * patch_size**2)
    if N != t * h * w or rest:
        raise ValueError(
            f"patches of shape {tuple(patches.shape)} are not the cubes of a grid {t}x{h}x{w} "
            f"with tubelet_size={tubelet_size}, patch_size={patch_size}"
        )
    x = patches.reshape(B, t, h, w, tubelet_size, patch_size, patch_size, C)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B,C, t,frame, h,row, w,column)
    return x.reshape(B, C, t * tubelet_size, h * patch_size, w * patch_size)


def split_mask(mask, device=None):
    """mask (B,N) bool, True = masked -> ids_keep (B,Nv), ids_mask (B,Nm), each ascending, on
    `device`.

    Raises ValueError if the rows mask different numbers of cubes. The counts decide shapes, so
    they are needed on the host: keep masks on the CPU and no GPU ever waits for this."""
    counts = mask.sum(1).tolist()
    if mask.dtype != torch.bool or len(set(counts)) != 1 or not 0 < counts[0] < mask.shape[1]:
        raise ValueError(
            f"mask {mask.dtype} {tuple(mask.shape)} masks {counts} cubes a video: must be bool, "
            "the same number in each, and neither none nor all"
        )
    B = len(mask)
    keep, hide = (~mask).nonzero()[:, 1].view(B, -1), mask.nonzero()[:, 1].view(B, -1)
    return keep.to(device, non_blocking=True), hide.to(device, non_blocking=True)


def take(x, ids):
    """x (B,N,D), ids (B,K) -> (B,K,D): each row's own tokens. A gather, since x[mask] would mix
    rows."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


# =================================================================================================
# Maskers: scores (B,t,h,w) -> mask (B,N). Every masker is a top-k over a score volume. Needs:
# torch, torch.nn.functional as F. From Augmentation: area_weights for motion; IMAGENET_MEAN,
# IMAGENET_STD for text. Paper: 3.3 (text); tube: VideoMAE; motion: MGM. In the paper all mask the
# same number in each slice.
# =================================================================================================

MASK_RATIOS = {"tube": 0.9, "mgm": 0.75, "tgm": 0.6}  # VideoMAE, MGM, and the paper's Figure 3(a)


def topk_mask(scores, mask_ratio, *, bottom_k=False, generator=None):
    """scores (B,t,h,w) -> mask (B,N) bool, True = masked (3.3): the int(mask_ratio*h*w) highest
    scores of every time slice (the lowest with bottom_k: the paper's Figure 3(b)), ties broken at
    random. ValueError for a ratio that masks none of them, or all."""
    B, t, h, w = scores.shape
    k = int(mask_ratio * h * w)
    if not 0 < k < h * w:
        raise ValueError(
            f"mask_ratio={mask_ratio} masks {k} of {h * w} patches in a slice: must mask 1 to "
            f"{h * w - 1}"
        )
    scores = scores.flatten(2)  # (B,t,h*w)
    # Shuffled first: whichever of two equal scores the sort puts first, it is a random one.
    device = scores.device if generator is None else generator.device
    shuffle = (
        torch.rand(scores.shape, generator=generator, device=device).argsort(-1).to(scores.device)
    )
    order = scores.gather(-1, shuffle).argsort(-1, descending=not bottom_k)  # (B,t,h*w), as shuffle
    chosen = shuffle.gather(-1, order[..., :k])  # (B,t,k)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True).flatten(1)  # (B,N)


def tube_scores(batch, grid, *, generator=None):
    """-> (B,t,h,w): noise shared over time (VideoMAE's tubes), so that a patch is masked in every
    slice or in none."""
    t, h, w = grid
    noise = torch.rand(
        batch, 1, h, w, generator=generator, device=generator.device if generator else None
    )
    return noise.expand(batch, t, h, w)


def motion_scores(motion, grid):
    """motion (B,T,h',w') -> (B,t,h,w), as in MGM: the mean over a cube's frames and, by area, over
    its cells. ValueError if T does not divide into t slices."""
    t, h, w = grid
    B, T, rows, cols = motion.shape
    if T % t:
        raise ValueError(f"motion of {T} frames does not divide into {t} time slices")
    slices = motion.reshape(B, t, T // t, rows, cols).mean(2)  # (B,t,h',w')
    down = area_weights(rows, h, 0, rows).to(motion)
    across = area_weights(cols, w, 0, cols).to(motion)
    return down @ slices @ across.T  # (B,t,h,w)


@torch.no_grad()
def patch_embeddings(clip, frames, patch_size, *, chunk=256):
    """frames (F,3,H,W) in [0,1], H and W multiples of patch_size -> (F,h,w,E) float32 unit vectors:
    every patch resized to the input of `clip`, an open_clip model, and embedded (3.3), in the
    precision of its weights. `chunk` patches at a time bound the memory."""
    F_, C, H, W = frames.shape
    h, w = H // patch_size, W // patch_size
    patches = frames.reshape(F_, C, h, patch_size, w, patch_size).permute(
        0, 2, 4, 1, 3, 5
    )  # (F,h,w,C,p,p)
    patches = patches.reshape(-1, C, patch_size, patch_size)  # (F*h*w, 3, p, p)

    cfg = clip.visual.preprocess_cfg
    mean, std = (frames.new_tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    size = clip.visual.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    embeddings = []
    dtype = next(clip.visual.parameters()).dtype
    for part in patches.split(chunk):
        part = F.interpolate(
            part, size, mode=cfg.get("interpolation", "bicubic"), align_corners=False
        )
        embedding = clip.encode_image(((part.clamp(0, 1) - mean) / std).to(dtype))  # (chunk,E)
        embeddings.append(F.normalize(embedding.float(), dim=-1))
    return torch.cat(embeddings).view(F_, h, w, -1)


def text_scores(clip, video, text, patch_size, tubelet_size, *, chunk=256):
    """The paper's text-guided scores (3.3): the embedding of every patch of each tubelet's first
    frame is compared with the caption's.

    clip: an open_clip model. video (B,3,T,H,W): ImageNet-normalised. text (B,E): the captions'
    embeddings. -> cosine similarity (B,t,h,w) float32."""
    frames = video[:, :, ::tubelet_size].transpose(1, 2)  # (B,t,3,H,W)
    mean, std = (video.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    frames = (frames * std + mean).clamp(0, 1)
    patches = patch_embeddings(clip, frames.flatten(0, 1), patch_size, chunk=chunk)  # (B*t,h,w,E)
    patches = patches.unflatten(0, frames.shape[:2])  # (B,t,h,w,E)
    return torch.einsum("bthwe,be->bthw", patches, F.normalize(text.float(), dim=-1))  # (B,t,h,w)


# =================================================================================================
# CLIP: any model that open_clip loads, frozen, and its text embeddings. Needs: os, pickle,
# urllib.error, urllib.request, Path, torch, torch.nn.functional as F. Paper: 3.3.
# =================================================================================================


def work_offline_if_no_hub(timeout=5):
    """Asks the Hugging Face hub once whether it is there. If not, open_clip and transformers are
    told to use what is on disk, and fail at once where that is not enough, not after a minute of
    retries.

    Call before they are imported. Returns whether the hub may be used."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(constants.ENDPOINT, timeout=timeout).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"
            constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE


def bf16_is_fast(device) -> bool:
    """Whether bf16 pays on this device: on GPUs that have it (Ampere and later), and on CPUs with
    bf16 matrix units."""
    kind = torch.device(device).type
    if kind != "cpu":
        return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def clip_name(name, pretrained):
    """How a text map calls a CLIP: the model and its weights, of a path the last part."""
    if name.startswith("local-dir:"):
        return f"local-dir:{Path(name.removeprefix('local-dir:')).name}"
    return name if name.startswith("hf-hub:") else f"{name}/{Path(str(pretrained)).name}"


def load_clip(name="ViT-B-32-quickgelu", pretrained="openai", device="cpu"):
    """-> (clip, tokenizer): a frozen open_clip model in eval mode, images in bf16 where that is
    fast.

    name: a model of open_clip, hf-hub:..., or local-dir:FOLDER; pretrained: a tag of open_clip or a
    file of weights, ignored for the last two. Plain ViT-B-32 would run OpenAI's weights with the
    wrong activation. Raises ValueError with the ways out if the weights cannot be had."""
    on_disk = name.startswith("local-dir:") or Path(str(pretrained)).is_file()
    online = True if on_disk else work_offline_if_no_hub()
    import open_clip  # here: seconds that a run with text maps, or without text, need not spend

    tag = None if name.startswith(("local-dir:", "hf-hub:")) else str(pretrained)
    try:
        # A missing file otherwise means random weights and a mere warning.
        clip = open_clip.create_model(name, tag, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if online else "the hub cannot be reached"
        raise ValueError(
            f"--clip {name} --clip-pretrained {pretrained}: {reason}. Ways out: --clip-pretrained "
            "FILE (weights on disk), --clip local-dir:FOLDER (an open_clip folder), or a manifest "
            "with text maps"
        ) from error
    if bf16_is_fast(device):  # the weights, not autocast: that turns attention's fast path off
        clip.visual.to(torch.bfloat16)
    return clip.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def encode_text(clip, tokenizer, captions):
    """Captions, B strings -> (B,E) float32 unit vectors on CLIP's device: the projected [EOS] state
    (3.3)."""
    device = next(clip.parameters()).device
    return F.normalize(clip.encode_text(tokenizer(list(captions)).to(device)).float(), dim=-1)


# =================================================================================================
# Transformer: visible cubes (B,Nv,P) -> Encoder (B,Nv,D);  tokens (B,N,Dd) -> Decoder (B,Nm,P).
# Needs: numpy as np, torch, torch.nn as nn, torch.nn.functional as F, checkpoint, StochasticDepth.
# From Cubes: take.
# Paper: 3.1, 4.2; names and order as in VideoMAE's modeling_finetune.py and modeling_pretrain.py.
# =================================================================================================


def sinusoid(positions, dim):
    """-> (positions,dim) fixed sine-cosine table over the flattened index of the cubes
    (VideoMAE)."""
    position = torch.arange(positions, dtype=torch.float64)[:, None]
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class Attention(nn.Module):
    """Joint space-time self-attention. q and v have a bias; k's would cancel in the softmax."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)  # (B,N,3D)
        q, k, v = qkv.view(B, N, 3, self.num_heads, -1).permute(
            2, 0, 3, 1, 4
        )  # 3 x (B,heads,N,D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B,heads,N,D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # (B,N,D)


class Mlp(nn.Module):
    """(B,N,D) -> (B,N,D): Linear, GELU, Linear."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each with a residual."""

    def __init__(self, dim, num_heads, mlp_ratio, eps, drop_path=0.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def _run_blocks(blocks, x, grad_checkpointing):
    for block in blocks:  # a checkpoint trades a second forward for memory
        x = checkpoint(block, x, use_reentrant=False) if grad_checkpointing else block(x)
    return x


class PatchEmbed(nn.Module):
    """Cubes (B,Nv,P) -> embeddings (B,Nv,D), equation (1): VideoMAE's Conv3d, as the matrix product
    that it is."""

    def __init__(self, patch_dim, embed_dim):
        super().__init__()
        self.proj = nn.Linear(patch_dim, embed_dim)

    def forward(self, cubes):
        return self.proj(cubes)


class Encoder(nn.Module):
    """Cubes (B,N,P) and ids_keep (B,Nv), or None for all -> (B,Nv,D) after the final norm (3.1)."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.patch_embed = PatchEmbed(c.patch_dim, c.embed_dim)
        self.register_buffer("pos_embed", sinusoid(c.num_patches, c.embed_dim), persistent=False)
        rates = np.linspace(
            0, c.drop_path, c.depth
        ).tolist()  # deeper blocks are dropped more often
        self.blocks = nn.ModuleList(
            Block(c.embed_dim, c.num_heads, c.mlp_ratio, c.layer_norm_eps, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.layer_norm_eps)
        self.grad_checkpointing = False

    def forward(self, cubes, ids_keep=None):
        pos = self.pos_embed
        if ids_keep is not None:  # only visible cubes are embedded
            cubes, pos = take(cubes, ids_keep), pos[ids_keep]  # (B,Nv,P), (B,Nv,D)
        x = self.patch_embed(cubes)  # (B,Nv,D)
        x = x + pos.to(x.dtype)  # under autocast bf16, and with it all residuals, as in VideoMAE
        return self.norm(_run_blocks(self.blocks, x, self.grad_checkpointing))


class Decoder(nn.Module):
    """Tokens (B,N,Dd), the masked ones last -> predicted cubes (B,Nm,P) (3.1)."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.blocks = nn.ModuleList(
            Block(c.decoder_embed_dim, c.decoder_num_heads, c.mlp_ratio, c.layer_norm_eps)
            for _ in range(c.decoder_depth)
        )
        self.norm = nn.LayerNorm(c.decoder_embed_dim, eps=c.layer_norm_eps)
        self.head = nn.Linear(c.decoder_embed_dim, c.patch_dim)
        self.grad_checkpointing = False

    def forward(self, x, num_masked):
        x = _run_blocks(self.blocks, x, self.grad_checkpointing)
        return self.head(self.norm(x[:, -num_masked:]))  # (B,Nm,Dd) -> (B,Nm,P)


# =================================================================================================
# Losses: reconstruction of the masked cubes, and InfoNCE between videos and captions over all
# ranks. Needs: torch, torch.distributed as dist, torch.nn.functional as F. From Cubes: patchify,
# split_mask, take. From Augmentation: IMAGENET_MEAN, IMAGENET_STD. Paper: 3.1, 3.4, equation (4).
# =================================================================================================


def reconstruction_target(video, mask, config):
    """video (B,3,T,H,W) ImageNet-normalised, mask (B,N) -> (target (B,Nm,P), mean, std (B,Nm,1,3))
    (3.1).

    Pixels are brought back to [0,1]; then each cube is normalised per channel over its own pixels
    (unbiased variance, std + 1e-6), as in VideoMAE. target.unflatten(-1, (-1, 3)) * std + mean are
    pixels again."""
    c = config
    _, ids_mask = split_mask(mask, video.device)
    pixels = take(patchify(video, c.patch_size, c.tubelet_size), ids_mask)  # (B,Nm,P)
    pixels = pixels.unflatten(-1, (-1, c.in_chans))  # (B,Nm,P/3,3)
    if c.in_chans == 3:
        pixels = pixels * pixels.new_tensor(IMAGENET_STD) + pixels.new_tensor(IMAGENET_MEAN)
    var, mean = torch.var_mean(pixels, dim=2, keepdim=True)  # (B,Nm,1,3)
    std = var.sqrt() + 1e-6
    if not c.norm_pix_loss:
        mean, std = torch.zeros_like(mean), torch.ones_like(std)
    return ((pixels - mean) / std).flatten(2), mean, std  # target (B,Nm,P)


def reconstruction_loss(pred, video, mask, config):
    """Mean squared error over the masked cubes (3.1). pred (B,Nm,P), masked cubes ascending; video
    (B,3,T,H,W) ImageNet-normalised; mask (B,N), True = masked. -> scalar, in float32 at least."""
    with torch.no_grad():
        target, _, _ = reconstruction_target(video, mask, config)
    return F.mse_loss(pred.to(target.dtype), target)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)  # (world*B,...)

    @staticmethod
    def backward(ctx, grad):
        # Every rank computed the whole loss, so the sum is world size times the gradient, and DDP's
        # mean over ranks brings it back to that of one process with the whole batch.
        grad = grad.clone(memory_format=torch.contiguous_format)  # others may hold the same tensor
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]  # (B,...)


def gather(x):
    """(B,...) of each rank, the same B -> (world*B,...) of all, in order of ranks, with gradient
    (3.4). One process: x."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _Gather.apply(x)


def info_nce(video_emb, text_emb, temperature, *, groups=None):
    """Symmetric InfoNCE (3.4, equation (4)): the mean of video->text and text->video.

    video_emb, text_emb (B,E), a pair a row, normalised here. groups (B,) ints: clips of one group
    (of one video, under --repeat) are no negatives of each other. -> scalar, in float32 at
    least."""
    with torch.autocast(video_emb.device.type, enabled=False):
        dtype = torch.promote_types(video_emb.dtype, torch.float32)
        video_emb = F.normalize(video_emb.to(dtype), dim=-1)
        text_emb = F.normalize(text_emb.to(dtype), dim=-1)
        logits = video_emb @ text_emb.T / temperature  # (B,B)
        if groups is not None:
            same = groups[:, None] == groups[None, :]
            same.fill_diagonal_(False)
            logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# =================================================================================================
# TGMAE: the model. video (B,3,T,H,W), mask (B,N), text (B,E) -> losses. Needs: torch, torch.nn as
# nn. From Config: Config. From Cubes: patchify, split_mask, unpatchify. From Transformer: Decoder,
# Encoder, sinusoid. From Losses: gather, info_nce, reconstruction_loss, reconstruction_target. From
# Augmentation: IMAGENET_MEAN, IMAGENET_STD. Paper: 3.5, Figure 2.
# =================================================================================================


class TGMAE(nn.Module):
    """Video MAE with an optional video-text contrastive loss on the visible tokens (3.5, Figure
    2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.encoder_to_decoder = nn.Linear(c.embed_dim, c.decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_embed_dim))
        self.register_buffer(
            "pos_embed", sinusoid(c.num_patches, c.decoder_embed_dim), persistent=False
        )
        self.decoder = Decoder(c)
        # SimCLR's head with a global BatchNorm. It sees the embeddings of all ranks, see forward.
        self.predictor = nn.Sequential(
            nn.Linear(c.embed_dim, c.embed_dim),
            nn.BatchNorm1d(c.embed_dim),
            nn.ReLU(inplace=True),
            nn.Linear(c.embed_dim, c.text_dim),
        )
        self.apply(self._init_weights)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def set_grad_checkpointing(self, on=True):
        """Recompute activations in the backward pass: less memory, a third more time."""
        self.encoder.grad_checkpointing = self.decoder.grad_checkpointing = on

    def _check(self, video, mask):
        c = self.config
        shape = (c.in_chans, c.num_frames, c.image_size, c.image_size)
        if video.ndim != 5 or video.shape[1:] != shape:
            raise ValueError(
                f"video has shape {tuple(video.shape)}, the model takes (B, "
                f"{', '.join(map(str, shape))})"
            )
        if mask is not None and mask.shape != (len(video), c.num_patches):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, this video has ({len(video)}, "
                f"{c.num_patches}) cubes"
            )

    def encode(self, video, mask=None):
        """video (B,3,T,H,W) ImageNet-normalised, mask (B,N), True = masked -> (B,Nv,D) after the
        final norm; all N cubes without a mask. Shapes that do not fit: ValueError."""
        self._check(video, mask)
        ids_keep = None if mask is None else split_mask(mask, video.device)[0]
        return self.encoder(
            patchify(video, self.config.patch_size, self.config.tubelet_size), ids_keep
        )

    def decode(self, latent, mask):
        """latent (B,Nv,D) of the visible cubes, mask (B,N) -> predicted masked cubes (B,Nm,P)
        (3.1)."""
        ids_keep, ids_mask = split_mask(mask, latent.device)
        visible = self.encoder_to_decoder(latent)  # (B,Nv,Dd)
        visible = visible + self.pos_embed[ids_keep].to(visible.dtype)
        masked = self.mask_token + self.pos_embed[ids_mask]  # (B,Nm,Dd)
        x = torch.cat([visible, masked.to(visible.dtype)], dim=1)  # (B,N,Dd)
        return self.decoder(x, ids_mask.shape[1])

    def forward(self, video, mask, text=None, *, mae=True, watch=False, groups=None):
        """video (B,3,T,H,W) ImageNet-normalised, mask (B,N), True = masked, best on the CPU (see
        split_mask), text (B,E) or None -> dict (3.5) of `mae`, a scalar, and `pred` (B,Nm,P),
        unless mae=False (then no decoder runs), and `vt`, a scalar, where there is text. Shapes
        that do not fit: ValueError.

        watch: take the contrastive loss on detached features: only the predictor learns from it
        (the paper's Figure 4). groups: see info_nce."""
        latent = self.encode(video, mask)  # (B,Nv,D)
        out = {}
        if mae:
            out["pred"] = self.decode(latent, mask)  # (B,Nm,P)
            out["mae"] = reconstruction_loss(out["pred"], video, mask, self.config)
        if text is not None:
            pooled = latent.mean(dim=1)  # (B,D)
            pooled = gather(pooled.detach() if watch else pooled)  # (world*B,D)
            groups = groups if groups is None else gather(groups)
            out["vt"] = info_nce(
                self.predictor(pooled), gather(text), self.config.temperature, groups=groups
            )
        return out


@torch.no_grad()
def reconstruct(video, mask, pred, config):
    """video (B,3,T,H,W) ImageNet-normalised, mask (B,N), pred (B,Nm,P) of TGMAE.forward, or None ->
    dict of videos (B,3,T,H,W) in [0,1]: `clip`, `masked` (in grey), and with pred `reconstructed`,
    in which masked cubes have their true mean and std put back, and `predicted`, in which they have
    not: 0.5 + pred/6 (4.7). Without norm_pix_loss these two are the same."""
    c = config
    std, mean = (video.new_tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_STD, IMAGENET_MEAN))
    cubes = patchify(video * std + mean, c.patch_size, c.tubelet_size)  # (B,N,P), pixels in [0,1]
    _, ids_mask = split_mask(mask, video.device)
    ids_mask = ids_mask[..., None].expand(-1, -1, c.patch_dim)  # (B,Nm,P)
    volumes = {"clip": cubes, "masked": cubes.scatter(1, ids_mask, 0.5)}
    if pred is not None:
        _, mean, std = reconstruction_target(video, mask, c)
        pixels = (pred.unflatten(-1, (-1, 3)) * std + mean).flatten(2)  # (B,Nm,P)
        volumes["reconstructed"] = cubes.scatter(1, ids_mask, pixels)
        volumes["predicted"] = cubes.scatter(
            1, ids_mask, 0.5 + pred / 6 if c.norm_pix_loss else pixels
        )
    return {
        name: unpatchify(volume, c.grid, c.patch_size, c.tubelet_size).clamp(0, 1)
        for name, volume in volumes.items()
    }


# =================================================================================================
# Weights in and out: VideoMAE's official names are ours, except for the patch embedding's shape.
# Needs: argparse, importlib.metadata, json, pickle, Path, torch.
# From Config: Config, PRESETS. From CLIP: work_offline_if_no_hub for hub names.
# =================================================================================================

# (ours, transformers'), each replaced wherever it stands. ".attention.output.dense." before
# ".output.dense.".
_HUGGINGFACE = (
    ("encoder.patch_embed.proj.", "videomae.embeddings.patch_embeddings.projection."),
    ("encoder.blocks.", "videomae.encoder.layer."),
    ("encoder.norm.", "videomae.layernorm."),
    ("decoder.blocks.", "decoder.decoder_layers."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    ("head.", "classifier."),
)


def from_videomae(state_dict):
    """The state dict of an official VideoMAE model, or of transformers' VideoMAE, for pre-training
    or fine-tuned -> in our names, without the predictor, which they lack. Fine-tuned ones bring
    fc_norm and head. Raises ValueError for anything else."""
    old, new = state_dict, {}
    if any(name.startswith(("embeddings.", "videomae.")) for name in old):
        for name, value in old.items():
            if name.startswith(
                ("embeddings.", "encoder.layer.", "layernorm.")
            ):  # a bare VideoMAEModel
                name = "videomae." + name
            for ours, theirs in _HUGGINGFACE:
                name = name.replace(theirs, ours)
            name = name.replace(".attention.attention.", ".attn.")
            name = name.replace(".query.bias", ".q_bias").replace(
                ".value.bias", ".v_bias"
            )  # since 5.0
            new[name] = value
        for name in [name for name in new if name.endswith(".query.weight")]:
            stem = name.removesuffix("query.weight")
            parts = [new.pop(f"{stem}{part}.weight") for part in ("query", "key", "value")]
            new[f"{stem}qkv.weight"] = torch.cat(parts)
    elif any(name.endswith("patch_embed.proj.weight") for name in old):
        bare = "patch_embed.proj.weight" in old  # fine-tuned: no encoder. in front
        for name, value in old.items():
            ours = bare and name.startswith(("patch_embed.", "blocks.", "norm."))
            new["encoder." + name if ours else name] = value
    if "encoder.patch_embed.proj.weight" not in new:
        raise ValueError(f"not VideoMAE's weights: names like {', '.join(list(old)[:3])}")
    weight = new["encoder.patch_embed.proj.weight"]  # (D,C,frame,row,column) -> (D,P)
    new["encoder.patch_embed.proj.weight"] = weight.permute(0, 2, 3, 4, 1).flatten(1)
    return new


def to_huggingface(model):
    """TGMAE -> state dict of transformers' VideoMAEForPreTraining (config: use_mean_pooling=False);
    a fine-tuned model of eval.py -> VideoMAEForVideoClassification."""
    c, new = model.config, {}
    five = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
    for name, value in model.state_dict().items():
        if name.startswith("predictor."):
            continue
        if name == "encoder.patch_embed.proj.weight":  # (D,P) -> (D,C,frame,row,column)
            value = value.view(-1, c.tubelet_size, c.patch_size, c.patch_size, c.in_chans).permute(
                0, 4, 1, 2, 3
            )
        for ours, theirs in _HUGGINGFACE:
            name = name.replace(ours, theirs) if ours != "head." or name.startswith(ours) else name
        if five:
            name = name.replace(".q_bias", ".query.bias").replace(".v_bias", ".value.bias")
        if name.endswith(".attn.qkv.weight"):
            stem = name.removesuffix("attn.qkv.weight")
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                new[f"{stem}attention.attention.{part}.weight"] = third.contiguous()
        else:
            new[name.replace(".attn.", ".attention.attention.")] = value.contiguous()
    return new


def load_file(path):
    """torch.load of a checkpoint, of which no pickled code is run; ValueError if it is not one."""
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # official files hold their flags
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a file of other contents makes torch raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: cannot be loaded as a checkpoint: {reason}") from error


def _official_config(state, flags):
    """Config of official weights, in our names except for the patch embedding. Neither the clip's
    size nor heads are in weights: those are what the file's flags say, and the published model's of
    that width."""
    D, C, tubelet, patch, _ = state["encoder.patch_embed.proj.weight"].shape
    known = next((preset for preset in PRESETS.values() if preset.embed_dim == D), None)

    def depth(part):
        return 1 + max(
            int(name.split(".")[2]) for name in state if name.startswith(f"{part}.blocks.")
        )

    sizes = dict(
        image_size=getattr(flags, "input_size", 224),
        num_frames=getattr(flags, "num_frames", 16),
        patch_size=patch,
        tubelet_size=tubelet,
        in_chans=C,
        embed_dim=D,
        depth=depth("encoder"),
        mlp_ratio=len(state["encoder.blocks.0.mlp.fc1.weight"]) / D,
        num_heads=known.num_heads if known else max(1, D // 64),
    )
    if "encoder_to_decoder.weight" in state:
        width = len(state["encoder_to_decoder.weight"])
        same = known and known.decoder_embed_dim == width
        sizes |= dict(
            decoder_embed_dim=width,
            decoder_depth=depth("decoder"),
            decoder_num_heads=known.decoder_num_heads if same else max(1, width // 64),
        )
    return Config(**sizes)


def _load_huggingface(source):
    import transformers

    try:
        theirs = transformers.VideoMAEConfig.from_pretrained(source)
        kind = (theirs.architectures or ["VideoMAEForPreTraining"])[0]
        if kind not in (
            "VideoMAEModel",
            "VideoMAEForPreTraining",
            "VideoMAEForVideoClassification",
        ):
            raise ValueError(f"{source}: a {kind}, not a VideoMAE")
        model = getattr(transformers, kind).from_pretrained(source)
    except pickle.UnpicklingError as error:  # of older files, read without running what they bring
        raise ValueError(
            f"{source}: holds more than weights: {str(error).strip().splitlines()[0]}"
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source}: neither a checkpoint nor a folder or hub name of transformers: {reason}"
        ) from error
    config = Config(
        image_size=theirs.image_size,
        patch_size=theirs.patch_size,
        num_frames=theirs.num_frames,
        tubelet_size=theirs.tubelet_size,
        in_chans=theirs.num_channels,
        embed_dim=theirs.hidden_size,
        depth=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        mlp_ratio=theirs.intermediate_size / theirs.hidden_size,
        layer_norm_eps=theirs.layer_norm_eps,
        decoder_embed_dim=theirs.decoder_hidden_size,
        decoder_depth=theirs.decoder_num_hidden_layers,
        decoder_num_heads=theirs.decoder_num_attention_heads,
        norm_pix_loss=theirs.norm_pix_loss,
    )
    saved = {"transformers": kind}
    if kind == "VideoMAEForVideoClassification":
        saved["classes"] = [theirs.id2label[number] for number in range(theirs.num_labels)]
    return config, from_videomae(model.state_dict()), saved


def _config(source, sizes):
    try:
        return Config(**sizes)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: its config makes no model: {error}") from error


def _load_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if "config" not in header:
                raise ValueError(f"{path}: not one that eval.py export wrote")
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot be loaded as safetensors: {error}") from error
    rest = {key: value for key, value in json.loads(header["saved"]).items() if value}
    return _config(path, json.loads(header["config"])), state, rest


def load_checkpoint(source):
    """-> (Config, state dict in our names, what else was there, a dict) from a checkpoint of
    train.py or eval.py, an official VideoMAE .pth, or a folder or hub name of transformers'
    VideoMAE. Sizes are read from it. Raises ValueError if it is none of these."""
    if not Path(source).is_file():
        if not Path(source).is_dir():
            work_offline_if_no_hub()
        return _load_huggingface(source)
    if Path(source).suffix == ".safetensors":
        return _load_safetensors(source)
    saved = load_file(source)
    if not isinstance(saved, dict):
        raise ValueError(f"{source}: holds a {type(saved).__name__}, not a checkpoint's dict")
    state = next((saved.pop(key) for key in ("model", "module") if key in saved), saved)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{source}: its weights are no dict of names and tensors")
    if "config" in saved:
        return _config(source, saved["config"]), state, saved
    conv = next(
        (value for name, value in state.items() if name.endswith("patch_embed.proj.weight")), None
    )
    try:
        ours = from_videomae(state)
        if conv is None:
            raise ValueError(
                "transformers' weights alone; the folder with their config.json is needed"
            )
        return (
            _official_config(ours | {"encoder.patch_embed.proj.weight": conv}, saved.get("args")),
            ours,
            {},
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


# =================================================================================================
# Runs: what the scripts share, and the method does not need: processes, schedule, the place of a
# video that cannot be read, log, checkpoints, steps with bad numbers, stopping and going on. Needs:
# argparse, atexit, contextlib, itertools, json, math, multiprocessing as mp, os, signal, sys, time,
# timedelta, Path, NamedTuple, numpy as np, torch, torch.distributed as dist, DataLoader, tqdm. From
# Reading: VideoError. From CLIP: bf16_is_fast. From Weights in and out: load_file.
# =================================================================================================


def end_loaders():
    """At exit: multiprocessing asks loaders that are left to end, by SIGTERM, which init_loader
    ignores, and waits."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end an error
    for child in mp.active_children():
        if child.daemon:
            child.kill()


def start_processes(args, backend=None, timeout=timedelta(minutes=30)):
    """Joins torchrun's process group, if it is torchrun that started us; settles args.device
    ("auto") and args.amp (None). -> rank, world size. The first process may need `timeout` to build
    the toy world."""
    if args.device == "auto":
        there = {
            "cuda": torch.cuda.is_available(),
            "mps": torch.backends.mps.is_available(),
            "cpu": True,
        }
        args.device = next(name for name in there if there[name])
    try:
        if args.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=args.device)
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # an AssertionError from a torch that is built without CUDA
        raise ValueError(f"--device {args.device}: {str(error).splitlines()[0]}") from error
    if args.amp is None:
        args.amp = bf16_is_fast(args.device)
    atexit.register(end_loaders)
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group(
        backend or ("nccl" if args.device == "cuda" else "gloo"), timeout=timeout
    )
    return dist.get_rank(), dist.get_world_size()


def rank_and_world():
    """(rank, world size) of this process; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_objects(mine):
    """What each process holds, in order of ranks."""
    parts = [mine] * rank_and_world()[1]
    if len(parts) > 1:
        dist.all_gather_object(parts, mine)
    return parts


def progress(*args, **more):
    """A tqdm bar; where it goes to a file, a line every ten seconds."""
    return tqdm(*args, mininterval=0.5 if sys.stderr.isatty() else 10, **more)


def seed_of(*numbers):
    """A seed that follows from the numbers alone: those of the run, the epoch, the sample, ..."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def learning_rate(step, warmup, total, peak, last, first=0.0):
    """-> the rate of `step`, counted from 0, of `total`: `warmup` steps linear from `first` to
    `peak`, then a cosine to `last`, as VideoMAE's cosine_scheduler."""
    if step < warmup:
        return first + (peak - first) * step / max(1, warmup - 1)
    return last + (peak - last) * 0.5 * (
        1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))
    )


MAX_REPLACEMENTS = 100  # bad videos in a row before all are thought to be bad


class TrainingClips(torch.utils.data.Dataset):
    """A dataset of (epoch, index) -> sample. A subclass has load(place, seed), which makes a dict
    of record number `place`; the seed follows from (the run's seed, epoch, index) alone, never from
    a worker's history, so a run that is resumed sees the same samples. A video that cannot be read
    gives its place to another, drawn from the same numbers; the sample's "bad" lists [(video, why),
    ...]. replace_bad=False: it is a VideoError instead."""

    def __init__(self, records, seed, *, replace_bad=True):
        self.records, self.run_seed = records, seed
        self.attempts = min(len(records), MAX_REPLACEMENTS) if replace_bad else 1

    def __len__(self):
        return len(self.records)

    def _places(self, epoch, index):
        """`index`, then the others in random order."""
        yield index
        generator = torch.Generator().manual_seed(seed_of(self.run_seed, epoch, index, 0))
        yield from (
            i for i in torch.randperm(len(self), generator=generator).tolist() if i != index
        )

    def __getitem__(self, epoch_and_index):
        (epoch, index), bad = epoch_and_index, []
        for place in itertools.islice(self._places(epoch, index), self.attempts):
            try:
                return {**self.load(place, seed_of(self.run_seed, epoch, index, 1)), "bad": bad}
            except VideoError as error:
                bad.append((self.records[place]["video"], str(error)))
        raise VideoError(f"{len(bad)} video(s) in a row cannot be read, the last: {bad[-1][1]}")


class Share(NamedTuple):
    """A step's videos, and how the processes share them."""

    videos: int  # of a step
    forward: int  # of a process in a forward
    accum: int  # forwards a step


def share_step(forward, accum, videos=None):
    """Splits a step over the processes that there are: `accum` forwards of `forward` videos each;
    or, where a run goes on, the `videos` that its steps had, at most `forward` at a time. A
    remainder that cannot be split evenly is left out of every step. More processes than videos:
    ValueError."""
    _, world = rank_and_world()
    videos = videos or forward * accum * world
    mine = videos // world
    if not mine:
        raise ValueError(f"{world} processes cannot share a step of {videos} video(s)")
    accum = -(-mine // forward)
    return Share(videos, mine // accum, accum)


def end_with_parent(_=None):
    """worker_init_fn of loader processes: ends one whose parent was killed before it started. torch
    watches only the parent that a loader finds at its start."""
    if mp.get_start_method() == "fork" and os.getppid() != mp.parent_process().pid:
        os._exit(1)


def init_loader(_=None):
    """worker_init_fn of a run's loader processes. A scheduler sends SIGTERM to all processes, but a
    run needs its loaders until it has saved; they end when it does."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def training_batches(data, share, args, step, steps_per_epoch, collate):
    """Batches of samples for this process, share.accum of them a step, from global step `step` on
    to the end of the last epoch. An epoch's order follows from the seed alone, whatever the number
    of processes. The loader processes are the same all along, and go on into the next epoch."""
    rank, world = rank_and_world()

    def order():
        for epoch in range(step // steps_per_epoch, args.epochs):
            generator = torch.Generator().manual_seed(args.seed + epoch)
            indices = torch.randperm(len(data), generator=generator).tolist()
            for place in range(max(0, step - epoch * steps_per_epoch), steps_per_epoch):
                mine = indices[place * share.videos : (place + 1) * share.videos][rank::world]
                yield from ((epoch, index) for index in mine[: share.forward * share.accum])

    return iter(
        DataLoader(
            data,
            share.forward,
            sampler=order(),
            num_workers=args.workers,
            collate_fn=collate,
            pin_memory=args.device == "cuda",
            worker_init_fn=init_loader,
        )
    )


def add_run_flags(add):
    """The flags of a Run, for train.py and eval.py finetune."""
    add(
        "--save-steps",
        type=int,
        default=0,
        help="steps between checkpoints (0: none between epochs)",
    )
    add(
        "--save-minutes",
        type=float,
        default=10,
        help="minutes between checkpoints (0: none between epochs)",
    )
    add(
        "--keep", type=int, default=0, help="how many checkpoints stay as step-N.pt, beside last.pt"
    )
    yes_no = argparse.BooleanOptionalAction
    add("--resume", action=yes_no, default=True, help="go on from the run folder's last.pt")


RUN_FLAGS = "save_steps", "save_minutes", "keep"


def check_flags(args, *, positive=(), not_negative=()):
    """ValueError that names the first of these flags, of those that there are, with a value that
    cannot be."""
    for name in (*positive, *not_negative):
        value = getattr(args, name, 1)
        if value < 0 or value == 0 and name in positive:
            flag, must = (
                name.replace("_", "-"),
                "be positive" if name in positive else "not be negative",
            )
            raise ValueError(f"--{flag} {value}: must {must}")


def load_last(args):
    """The checkpoint from which the run in --out goes on, None if it begins. The same one for all
    processes: a ValueError where a machine sees another."""
    path = Path(args.out) / "last.pt"
    saved = load_file(path) if args.resume and path.exists() else None
    if saved and not {"args", "step", "videos"} <= saved.keys():
        raise ValueError(
            f"{path}: not a checkpoint that a run goes on from; another --out, or --no-resume"
        )
    steps = gather_objects(saved["step"] if saved else 0)
    if len(set(steps)) > 1:
        here = steps[rank_and_world()[0]]
        raise ValueError(
            f"{path}: holds step {here} here, {steps[0]} for process 0: machines share --out"
        )
    return saved


def refuse_another_run(args, then, now, keys):
    """ValueError if what the run in --out was made with differs in one of the keys."""
    changed = [f"{key} {then.get(key)} -> {now[key]}" for key in keys if then.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"{args.out}/last.pt is of another run ({', '.join(changed)}): another --out, or "
            "--no-resume to start over"
        )


@contextlib.contextmanager
def naming(path):
    """Within it an OSError, such as a full disk's, names `path`, which by itself it does not."""
    try:
        yield
    except OSError as error:
        raise OSError(
            error.errno, f"cannot be written: {error.strerror or error}", str(path)
        ) from error


@contextlib.contextmanager
def replacing(path, mode="wb", **more):
    """Yields a file beside `path` to write to, then flushes and renames it: whatever happens,
    `path` is whole."""
    partial = Path(f"{path}.partial")
    with naming(path):
        try:
            with open(partial, mode, **more) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def _append(path, text):
    with naming(path), open(path, "a") as file:
        file.write(text)


def append_log(path, line):
    """Adds a dict to a file of JSON lines."""
    _append(path, json.dumps(line) + "\n")


def _cut_log(path, step):
    """Drops the lines after `step`: those steps will be taken again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with replacing(path, "w") as file:
        file.write("".join(kept))


def save_checkpoint(path, *, keep=0, **state):
    """Writes `state` to `path`. With keep, a link to it stays as step-N.pt, and only the newest
    `keep` of these do."""
    with replacing(path) as file:
        torch.save(state, file)
    if keep:
        numbered = path.with_name(f"step-{state['step']:08}.pt")
        numbered.unlink(missing_ok=True)
        os.link(path, numbered)
        written = sorted(path.parent.glob("step-*.pt"), key=lambda file: file.stat().st_mtime)
        for old in written[:-keep]:
            old.unlink()


MAX_NON_FINITE = 10  # steps in a row without finite numbers before a run stops


class Run:
    """A training run: its folder and log, where it stands, and when it saves, leaves out a step,
    stops. Inside `with`, SIGTERM asks it to save and stop. All processes call agree, log and save
    together."""

    def __init__(self, args, step, steps_per_epoch):
        self.args, self.step, self.steps_per_epoch = args, step, steps_per_epoch
        self.total = args.epochs * steps_per_epoch
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.rank, self.world = rank_and_world()
        if self.rank == 0:
            _cut_log(self.out / "log.jsonl", step)
        self.skipped = 0  # steps in a row
        self.signalled = self.stopping = False
        self.saved_step, self.saved_at = step, time.monotonic()
        self.bar = progress(total=self.total, initial=step, unit="step", disable=self.rank > 0)

    def __enter__(self):
        def ask(*_):
            self.signalled = True

        self.before = signal.signal(signal.SIGTERM, ask)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)
        self.bar.close()

    def note_bad(self, bad):
        """Lists videos that could not be read in bad_videos.txt, once each, with the reason."""
        path = self.out / "bad_videos.txt"
        if bad:
            known = path.read_text() if path.exists() else ""
            new = {video: why for video, why in bad if f"\n{video}\t" not in f"\n{known}"}
            _append(path, "".join(f"{video}\t{why}\n" for video, why in new.items()))

    def agree(self, sums, norms, videos):
        """Losses and counts of this process's step (n,), norms of the gradient, the step's videos
        -> sums over all processes, and, if a number of any process is not finite, the videos to
        blame: then every process must leave the step out. They are those of the processes whose
        first sum is not finite, or of all if there is none."""
        suspect = not sums[0].isfinite()
        broken = not sums.isfinite().all() or not all(map(math.isfinite, norms))
        sums = torch.cat([sums, sums.new_tensor([broken, suspect, self.signalled])])
        if self.world > 1:
            dist.all_reduce(sums)
        *_, broken, suspects, signalled = sums.tolist()
        self.stopping = signalled > 0
        blamed = gather_objects(videos if suspect or not suspects else []) if broken else []
        return sums[:-3], sorted(set(itertools.chain(*blamed)))

    def log(self, line, blamed=()):
        """Ends a step: its line in log.jsonl. ValueError after too many in a row without finite
        numbers."""
        self.step += 1
        self.skipped = self.skipped + 1 if blamed else 0
        line = {key: value if math.isfinite(value) else None for key, value in line.items()}
        self.bar.set_postfix(
            {key: line[key] for key in ("mae", "vt", "loss", "wait") if key in line}, refresh=False
        )
        self.bar.update()
        if self.rank == 0:
            append_log(self.out / "log.jsonl", line | ({"skipped": blamed} if blamed else {}))
        if self.skipped == MAX_NON_FINITE:
            raise ValueError(
                f"step {self.step}: {self.skipped} in a row without a finite loss and gradient, "
                f"the videos are in {self.out}/log.jsonl; {self.out}/last.pt is as it was, of "
                f"step {self.saved_step}"
            )

    def save(self, state):
        """Writes last.pt, state() and all, if that is due: at the end of an epoch, after
        --save-steps or --save-minutes, when asked to stop (then SystemExit); not between steps that
        were left out."""
        args, last = self.args, self.step == self.total
        due = self.step % self.steps_per_epoch == 0 or self.stopping
        due |= args.save_steps > 0 and self.step % args.save_steps == 0
        due |= args.save_minutes > 0 and time.monotonic() - self.saved_at >= 60 * args.save_minutes
        if due and (last or not self.skipped):
            if self.rank == 0:
                save_checkpoint(self.out / "last.pt", keep=args.keep, step=self.step, **state())
            self.saved_step, self.saved_at = self.step, time.monotonic()
        if self.stopping and not last:
            if self.world > 1:
                dist.barrier()  # until process 0 has written
            self.bar.close()
            if self.rank == 0:
                print(
                    f"stopped by SIGTERM; {self.out}/last.pt holds step {self.saved_step}",
                    file=sys.stderr,
                )
            sys.exit(
                128 + signal.SIGTERM
            )  # as for a process that the signal ends: the run is not finished


def last_line(error):
    """What an exception says, in one line: a loader process puts its traceback in front of the
    message."""
    if isinstance(error, torch.OutOfMemoryError):  # followed by a page of advice
        return ". ".join(str(error).split(". ")[:2])
    text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return text.removeprefix("tgmae.VideoError: ").removeprefix("ValueError: ")


@contextlib.contextmanager
def one_line_errors(script, less):
    """For a script's main: a user's mistake is one line and exit code 1, and so is a lack of
    memory, with what needs `less`; anything else keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {last_line(error)}")
    except torch.OutOfMemoryError as error:
        sys.exit(f"{script}: {last_line(error)}; what needs less: {less}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
