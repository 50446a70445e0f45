"""From a line of a manifest to a clip: records, frames and codec motion in one decode, text maps,
and the one crop that all of these share.

    frames, motion = read_clip("a.mp4", range(0, 64, 4), motion=True)  # (T,H,W,3), (T,H/8,W/8)
    crop = multi_scale_crop(frames.shape[1:3])
    video = crop_frames(frames, crop, 224)  # (3,T,224,224) uint8, for tgmae.normalize
    motion = crop_motion(motion, crop, (8, 14, 14))  # (T,14,14), for tgmae.motion_scores

train.py does this for every sample, captions.py writes manifests and text maps. Each section can be
copied: README says what it needs. Shapes as in tgmae.py.
"""

import array
import contextlib
import errno
import functools
import gc
import io
import itertools
import json
import math
import operator
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torchvision.transforms.v2 import functional as TF

# ==== Reading: file -> frames (T,H,W,3) uint8 [+ motion (T,H/8,W/8)] ==============================
# A frame's number is its rank in order of presentation. Motion: as this paper tells of MGM (2.2).
MOTION_CELL = 8  # pixels: the codec's smallest block
MAX_PIXELS = 8192 * 4320  # of a frame; a broken header may claim anything


class UserError(ValueError):
    """A mistake of the user, told in one line; anything else that is raised is a bug."""


class VideoError(UserError):
    """A video that cannot be read. The message is one line that names the file."""


class NoMotionVectors(UserWarning):
    """The codec exported no motion vectors, and the difference of frames stands in for them."""


class VideoInfo(NamedTuple):
    """What probe_video finds."""

    frames: int
    fps: float
    size: tuple[int, int]  # (height, width) as shown, so after rotation


class _Index(NamedTuple):
    """What a file's packets say of its frames; frame number i is the i-th that a player shows."""

    pts: np.ndarray | None  # (frames,) sorted, for finding a frame's number; None: they are counted
    keys: np.ndarray  # numbers of key frames, from which to decode; none: from the file's start
    seconds: np.ndarray  # (frames,) from the first frame on
    places: np.ndarray  # (frames,) of their packets in the file, so in the order of decoding
    fps: float
    last_pts: int | None  # of the file's last packet, of which half may be cut off

    @property
    def order(self):
        """How frames are numbered: by their "time", or as they come out of the "decoder"."""
        return "time" if len(self.keys) else "decoder"


class Video(NamedTuple):
    """A video file that is open, see open_video."""

    path: str
    container: av.container.InputContainer
    stream: av.VideoStream
    index: _Index
    motion: bool


# Titles that are not UTF-8: PyAV 19 replaces odd bytes by itself, and has no such argument.
_ODD_TITLES = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


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
            size = f"{stream.width}x{stream.height} pixels"
            if stream.width * stream.height > MAX_PIXELS or 1 in (stream.width, stream.height):
                raise VideoError(f"{path}: {size}, larger than 8K, or too small to crop")
            # Loaders run a process a core; and with several threads in one decoder the number of
            # motion vectors changes from run to run.
            stream.codec_context.thread_count = 1
            # Set before the first frame is decoded. Unaligned: cropped at the left as it says.
            options = {"flags": "+unaligned", "max_pixels": str(MAX_PIXELS)}
            if motion:
                options["flags2"] = "+export_mvs"
            stream.codec_context.options = options
            yield container, stream
    except (av.FFmpegError, OSError) as error:
        if error.errno == errno.EMFILE:  # nothing is wrong with the video
            raise UserError(f"{path}: {error.strerror}") from error
        raise VideoError(f"{path}: {error.strerror or error}") from error


def _demux(container, stream):
    # PyAV's generator leaks memory when it is left before its end and not closed.
    return contextlib.closing(container.demux(stream))


def _orientation(frame):
    """(transpose, flip rows, flip columns): of the eight orientations the nearest to the display
    matrix in the metadata, which is not applied by itself."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # (x,y) -> (ax + cy, bx + dy)
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, b < 0, c < 0
    return False, d < 0, a < 0


# In these a packet has the time of its frame, and a mark if decoding can begin there.
TIMED_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm"}
TIMED_CODECS = {"h264", "hevc", "vp8", "vp9", "av1"}
FIRST_PACKETS = 50  # that tell the order of frames; no codec reorders more than 16


def _never_back(times):
    return all(one <= other for one, other in itertools.pairwise(times))


def _decode_packet(packet):
    """-> the frames that come out; None if the packet is damaged."""
    try:
        return packet.decode()
    except av.InvalidDataError:
        return None


def _seconds(times, fps):
    """Times of packets in seconds, in order of decoding, None where one has none -> of as many
    frames, from the first on. Where times go back (files were joined) they go on as before."""
    known = [i for i, time in enumerate(times) if time is not None]
    if len(known) < 2:
        return np.arange(len(times)) / (fps or 25)
    steps = np.diff([times[i] for i in known])
    steps[steps < 0] = np.median(abs(steps))
    return np.interp(np.arange(len(times)), known, np.cumsum([0, *steps]))


def _scan(path, container, stream):
    """-> _Index, of all packets, since headers lie about the number of frames. The first of them
    are decoded where only frames tell their order, or which of them come out."""
    codec, rows, first, fed, keys = stream.codec_context, [], [], 0, 0
    for packet in container.demux(stream):
        # Edit lists discard packets. VP8 has packets whose frame is never shown: bit 4 of the first
        # byte (RFC 6386, 9.1).
        hidden = codec.name == "vp8" and packet.size and not memoryview(packet)[0] & 0x10
        if packet.size and not packet.is_discard and not hidden:
            rows.append((packet.pts, packet.dts, packet.is_keyframe))
        keys += packet.is_keyframe and packet.size > 0
        if packet.size and (keys == 0 or keys == 1 and fed < FIRST_PACKETS):
            first.append(packet)
            fed = len(rows)
    if not rows:
        raise VideoError(f"{path}: no frames")
    pts, dts, is_key = zip(*rows)
    fps, time_base = float(stream.average_rate or 0), float(stream.time_base or 0)
    timed = container.format.name in TIMED_CONTAINERS and None not in pts
    timed = timed and codec.codec.canonical_name in TIMED_CODECS and len(set(pts)) == len(pts)
    # B-frames make times go back, unless these are times of decoding. What comes before the first
    # key frame may refer to what was cut off there, and not come out.
    unsure = not timed or not is_key[0] or min(pts) < pts[0]
    unsure = unsure or (codec.has_b_frames and _never_back(pts))
    out = []  # times of the first frames, as they come out
    if unsure:
        frames = [frame for packet in first for frame in _decode_packet(packet) or []]
        out = [frame.pts for frame in frames + codec.decode(None)]
    joined = not _never_back([time for time in dts if time is not None])
    if joined or None in pts or None in out or not _never_back(out):  # frames are counted
        times = [one if other is None else other for one, other in zip(pts, dts)]
        if None not in pts and not joined:
            times = sorted(pts)
        times = [None if time is None else time * time_base for time in times]
        seconds = _seconds(times[max(0, fed - len(out)) :], fps)
        return _Index(None, np.empty(0, int), seconds, np.arange(len(seconds)), fps, pts[-1])
    times = np.array(pts)
    places = np.argsort(times, kind="stable")
    if out:
        places = places[times[places] >= out[0]]
    keys = np.flatnonzero(np.array(is_key)[places]) if timed else np.empty(0, int)
    seconds = (times[places] - times[places[0]]) * time_base
    return _Index(times[places], keys, seconds, places, fps, pts[-1])


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
        seconds = video.index.seconds
    first = 0 if start is None else int(np.searchsorted(seconds, start - 1e-6))
    stop = len(seconds) if end is None else int(np.searchsorted(seconds, end - 1e-6))
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


def _by_key(keys, frames):
    """Cuts frame numbers into runs, each decoded from one key frame; a new run begins where a seek
    to a later key frame saves decoding. -> [(key frame, [frame, ...]), ...]."""
    runs = []
    for number in frames:
        before = keys[: np.searchsorted(keys, number, side="right")]
        key = int(before[-1]) if len(before) else 0
        if not runs or key > runs[-1][1][-1] + 1:
            runs.append((key, []))
        runs[-1][1].append(number)
    return runs


def _number(index, frame, before=-1):
    """The number of a frame that came out after number `before`; None if no packet announced it."""
    if index.pts is None:
        return before + 1
    if frame.pts is None:
        return None
    number = max(int(np.searchsorted(index.pts, frame.pts)), before + 1)  # of equal times the next
    return number if number < len(index.pts) and index.pts[number] == frame.pts else None


def _packets(video, key, number):
    """Packets from key frame `key` on, or from an earlier one, from which frame `number` can be
    decoded; none if no seek lands early enough."""
    pts = video.index.pts
    for target in (number, key):  # where frames are reordered, the first may land on a later key
        video.container.seek(int(pts[target]), stream=video.stream)
        with _demux(video.container, video.stream) as packets:
            first = next(packets)
            if first.pts is not None and first.pts <= pts[key]:
                yield first
                yield from packets
                return


def _decode_by_key(video, frames):
    """Yields (number, frame) for the frames, and for those decoded on the way to them."""
    codec, index = video.stream.codec_context, video.index
    for key, run in _by_key(index.keys, frames):
        awaited = set(index.pts[run].tolist())
        for packet in _packets(video, key, run[0]):
            # In H.264 frames can be left out that nothing refers to. (An HEVC frame that says so of
            # itself may still be referred to by those of a higher temporal layer.)
            if codec.name == "h264":
                codec.skip_frame = "DEFAULT" if packet.pts in awaited else "NONREF"
            awaited.discard(packet.pts)
            decoded = packet.decode()
            if not awaited and packet.size:  # all is in: flush what the decoder holds back
                decoded += codec.decode(None)
            for frame in decoded:
                number = _number(index, frame)
                if number is not None:
                    yield number, frame
            if not awaited:
                break


def _decode_from_start(video, frames, left):
    """Yields (number, frame) for those of the frames that are left, in another decoder. For a frame
    that does not come out it is the one before, which stands on the screen then. VideoError if that
    is longer than a second, or one of the frames is damaged, or refers to one that is."""
    path, index = video.path, video.index
    until = np.flatnonzero(index.places <= index.places[frames].max())[-1]  # they may refer to it
    number, screen = -1, None  # of the last frame that came out
    broken = damaged = key_came = False

    def on_screen(wanted):
        if screen is None or index.seconds[wanted] - index.seconds[number] > 1:
            raise VideoError(f"{path}: frame {wanted} cannot be decoded")
        if damaged:
            raise VideoError(f"{path}: frame {wanted} is damaged, or one before it")
        return wanted, screen

    again = _open_stream(path, video.motion)
    with again as (container, stream), _demux(container, stream) as packets:
        for packet in packets:
            if broken and packet.size:  # not the file's last packet, of which half was cut off
                damaged, key_came, broken = True, False, False
            key_came = key_came or packet.is_keyframe
            decoded = _decode_packet(packet)
            if decoded is None:
                broken = True
                number += index.pts is None and screen is not None
            for frame in decoded or []:
                cut_off = frame.is_corrupt and frame.pts == index.last_pts
                found = None if cut_off else _number(index, frame, number)
                if found is None:
                    continue
                while left and left[0] < found:
                    yield on_screen(left.pop(0))
                if frame.key_frame and key_came:
                    damaged = False
                if frame.is_corrupt:
                    damaged = key_came = True
                    for one in frames:
                        if one < found and index.places[one] > index.places[found]:
                            raise VideoError(f"{path}: frame {one} may refer to {found}, damaged")
                number, screen = found, frame
                if left and left[0] == found:
                    yield on_screen(left.pop(0))
                if not left and number >= until:
                    return
        while left:
            yield on_screen(left.pop(0))


def _decode(video, frames):
    """Yields (number, frame) for the frames, whose numbers are sorted and all different."""
    left = list(frames)
    with contextlib.suppress(av.InvalidDataError):
        for number, frame in _decode_by_key(video, frames) if len(video.index.keys) else ():
            if frame.is_corrupt or (left and number > left[0]):
                break  # one is damaged, or did not come out
            if left and number == left[0]:
                yield left.pop(0), frame
        else:
            if not left:
                return
    yield from _decode_from_start(video, frames, left)


def _turn(picture, orientation):
    """(H,W,...) -> as shown."""
    transpose, flip_rows, flip_columns = orientation
    picture = picture.swapaxes(0, 1) if transpose else picture
    return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _first_frame(video):
    """-> (height, width) as coded, and orientation, of the file's first frame."""
    with contextlib.closing(_decode_from_start(video, [0], [0])) as decoded:
        _, frame = next(decoded)
        return (frame.height, frame.width), _orientation(frame)


def probe_video(path) -> VideoInfo:
    """Frame count, frames per second and (height, width) of a video; decodes its first frame.

    Raises VideoError if there is no video stream or no frame that can be decoded."""
    with open_video(path) as video:
        (height, width), (transpose, *_) = _first_frame(video)
        size = (width, height) if transpose else (height, width)
        return VideoInfo(len(video.index.seconds), video.index.fps, size)


# PyAV scales in as many threads as there are cores (since 17), and keeps them for the next frame
# (since 19), for which a loader process that is forked in between would wait for ever. So: one
# thread, and scalers of our own.


def _to_rgb(frame, size, scalers):
    if frame.format.components[0].bits > 8:  # straight to rgb24 swscale is off by up to 3 levels
        frame = scalers[0].reformat(frame, format="yuv420p", threads=1)
    height, width = size
    return scalers[1].reformat(frame, width, height, "rgb24", threads=1).to_ndarray()


def _block_motion(frame, rows, cols):
    """Length of a frame's motion vectors in pixels, (rows,cols) cells of 8x8 pixels, NaN where
    there is none; None if the frame has none at all, as key frames."""
    data = frame.side_data.get("MOTION_VECTORS")
    if not data:
        return None
    v = data.to_ndarray()
    length = np.hypot(v["motion_x"], v["motion_y"]) / v["motion_scale"]
    # The cell of a block's upper left corner (dst is its centre), on a plane with two more cells on
    # each side, where blocks go that lie outside. A block of 16 covers two cells, one of 8 one.
    y = ((v["dst_y"] - v["h"] // 2) // MOTION_CELL + 2).clip(0, rows + 2)
    x = ((v["dst_x"] - v["w"] // 2) // MOTION_CELL + 2).clip(0, cols + 2)
    plane = rows + 4, cols + 4
    cell = y.astype(int) * plane[1] + x
    tall, wide = v["h"] > MOTION_CELL, v["w"] > MOTION_CELL
    both = tall & wide
    cell = np.concatenate([cell, cell[wide] + 1, cell[tall] + plane[1], cell[both] + plane[1] + 1])
    length = np.concatenate([length, length[wide], length[tall], length[both]])
    size = math.prod(plane)
    with np.errstate(invalid="ignore"):  # two in a B-block: the mean
        motion = np.bincount(cell, length, size) / np.bincount(cell, minlength=size)
    return motion.reshape(plane)[2:-2, 2:-2].astype(np.float32)


def _fill_missing(fields):
    """Fields (h',w') with gaps, or None, one a frame, not all None -> (F,h',w'). A NaN cell takes
    the value of the nearest frame that has one (the later of two: a key frame often opens a new
    shot), 0 where none has."""
    empty = np.full_like(next(field for field in fields if field is not None), np.nan)
    motion = np.stack([empty if field is None else field for field in fields])
    gaps = np.isnan(motion).any(0)
    known = ~np.isnan(motion[:, gaps])  # (F, cells with a gap)
    number, far = np.arange(len(motion))[:, None], 3 * len(motion)  # farther than any that is there
    before = np.maximum.accumulate(np.where(known, number, -far))
    after = np.minimum.accumulate(np.where(known, number, far)[::-1])[::-1]
    nearest = np.where(number - before < after - number, before, after).clip(0, len(motion) - 1)
    motion[:, gaps] = np.nan_to_num(np.take_along_axis(motion[:, gaps], nearest, axis=0))
    return motion


def _frame_difference(frames):
    """(T,H,W,3) uint8 -> (T,h',w'): mean absolute difference to the frame before, in greys."""
    grey = frames.float().mean(-1)
    change = (grey[1:] - grey[:-1]).abs() if len(grey) > 1 else torch.zeros_like(grey)
    change = torch.cat([change[:1], change])[: len(grey)]
    return F.avg_pool2d(change[:, None], MOTION_CELL, ceil_mode=True)[:, 0]


def each_frame(video, numbers, *, motion=False):
    """Yields (number, frame (H,W,3) uint8, its field of motion or None) for numbers that are sorted
    and all different, of a Video, in one pass. All frames have the size of the file's first.
    VideoError as read_clip."""
    size, orientation = (video.stream.height, video.stream.width), None
    scalers, sure = (VideoReformatter(), VideoReformatter()), False
    for number, frame in _decode(video, numbers):
        if orientation is None:
            orientation = _orientation(frame)
        if (frame.height, frame.width) != size and not sure:
            (size, orientation), sure = _first_frame(video), True
        rgb = _turn(_to_rgb(frame, size, scalers), orientation)
        field = None
        if motion and (frame.height, frame.width) == size:
            field = _block_motion(frame, *(-(-side // MOTION_CELL) for side in size))
        yield number, rgb, None if field is None else _turn(field, orientation)


def read_clip(path, frames, *, motion=False):
    """Reads the frames with the given numbers (sorted integers of any kind, repeats allowed), all
    in one decode. path: a file, or a Video from open_video.

    Returns frames (T,H,W,3) uint8; with motion=True (frames, motion): motion (T,H/8,W/8) float32,
    rounded up, is the length of the codec's motion vectors in pixels of the source. A block without
    one borrows from the nearest of the frames that has one. If none of them has (HEVC, VP9 and AV1
    export none) it is the absolute difference of frames instead, and a NoMotionVectors warning. A
    frame that the decoder does not give shows the one before.
    Raises ValueError for a number out of range, VideoError for a file that cannot be read."""
    frames = [operator.index(number) for number in frames]
    rgb, fields = {}, {}
    with open_video(path, motion=motion) as video:
        path, last = video.path, len(video.index.seconds) - 1
        if not frames or frames != sorted(frames) or frames[0] < 0 or frames[-1] > last:
            raise ValueError(
                f"{path}: frame numbers {frames}: must be sorted and in 0..{last}, one at least"
            )
        if motion and not video.motion:
            raise ValueError(f"{path}: motion of a video that was opened without motion=True")
        for number, picture, field in each_frame(video, sorted(set(frames)), motion=motion):
            rgb[number], fields[number] = picture, field
    clip = torch.from_numpy(np.stack([rgb[number] for number in frames]))
    if not motion:
        return clip
    gc.collect(1)  # in PyAV a frame and its side data hold each other: they would pile up
    if any(field is not None for field in fields.values()):
        return clip, torch.from_numpy(_fill_missing([fields[number] for number in frames]))
    note = NoMotionVectors(f"{path}: no motion vectors, frame differences instead")
    warnings.warn(note, stacklevel=2)
    unique = sorted(rgb)
    change = _frame_difference(torch.from_numpy(np.stack([rgb[number] for number in unique])))
    return clip, change[[unique.index(number) for number in frames]]


# ==== Manifest: records of clips; text maps, which captions.py makes ==============================
def clip_name(name, pretrained):
    """How a text map calls a CLIP: the model and its weights, of a path the last part."""
    if name.startswith("local-dir:"):
        return f"local-dir:{Path(name.removeprefix('local-dir:')).name}"
    return name if name.startswith("hf-hub:") else f"{name}/{Path(str(pretrained)).name}"


class TextMap(NamedTuple):
    """What CLIP says of a clip, computed once: see captions.py maps. h'*w' patches in a frame."""

    similarity: torch.Tensor  # (captions,F,h',w') cosine of every patch and every caption
    frames: torch.Tensor  # (F,) their numbers in the file
    text: torch.Tensor  # (captions,E) unit vectors
    clip: str  # model, weights, and the first digits of the weights' SHA-256
    size: tuple[int, int]  # (height, width) of the source
    resized: tuple[int, int]  # as CLIP saw it: h'*patch_size, w'*patch_size
    patch_size: int
    order: str  # how frames were numbered: Video.index.order, or "" in maps of before 2026-11-26
    bytes: int  # of the video's file; 0 in maps of before 2026-11-27


def read_map(path, captions, clip=None, order=None, video=None, numbers=()) -> TextMap:
    """Reads a text map (.npz without pickles). Raises UserError if it is broken, was made of other
    captions, or (where these are given) by another CLIP, of a video whose frames were numbered in
    another order (Video.index.order) then, of another file than `video`, or of a piece of it in
    which not all `numbers` lie."""
    again = "python captions.py maps makes it anew"
    try:
        with np.load(path, allow_pickle=False) as file:
            saved = TextMap(
                *(torch.from_numpy(file[name]) for name in ("similarity", "frames", "text")),
                str(file["clip"]),
                tuple(file["source_size"].tolist()),
                tuple(file["resized_size"].tolist()),
                int(file["patch_size"]),
                str(file["order"]) if "order" in file else "",
                int(file["bytes"]) if "bytes" in file else 0,
            )
            made_of = file["captions"].tolist()
            if not len(saved.frames):
                raise ValueError("no frames")
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: not a whole text map ({reason}); {again}") from error
    if made_of != [caption.rstrip("\0") for caption in captions]:  # as NumPy keeps texts
        raise UserError(
            f"{path}: a text map of other captions ({made_of}, now {captions}); {again}"
        )
    if video and saved.bytes not in (0, now := os.path.getsize(video)):
        raise UserError(
            f"{path}: a text map of when {video} had {saved.bytes:,} bytes, not {now:,}; {again}"
        )
    # Maps of before have no order; where frames are numbered by time the numbers are the same now.
    if order not in (None, saved.order) and (saved.order or order == "decoder"):
        raise UserError(
            f"{path}: a text map from when the frames of its video were numbered in another order; "
            f"{again}"
        )
    # Each is less than `every` from a mapped frame; of a map of one frame nothing is known.
    every = saved.frames.diff().max() if len(saved.frames) > 1 else math.inf
    first, last = saved.frames[0].item(), saved.frames[-1].item()
    if not all(first - every < number < last + every for number in numbers):
        raise UserError(
            f"{path}: a text map of frames {first} to {last}, for a clip of {min(numbers)} to "
            f"{max(numbers)}: its start or end was another; {again}"
        )
    if clip not in (None, saved.clip):
        raise UserError(
            f"{path}: a text map made with CLIP {saved.clip}, not {clip}; {again}, with --force"
        )
    return saved


def _texts(value):
    return isinstance(value, list) and all(isinstance(t, str) and t.strip() for t in value)


VALUES = {  # of a record's known keys
    "a text": ({"video", "maps", "failed"}, lambda value: type(value) is str),
    "a non-empty text": ({"split"}, lambda value: type(value) is str and value),
    "a text or a whole number": ({"label"}, lambda value: type(value) in (str, int)),
    "a whole number": ({"class_id"}, lambda value: type(value) is int),
    "a number, of seconds": ({"start", "end"}, lambda value: type(value) in (int, float)),
    "a list of non-empty texts": ({"captions", "human_captions"}, _texts),
}


def _present(record):
    return {key: value for key, value in record.items() if value is not None and value == value}


class Manifest(Sequence):
    """Records of a manifest, see read_manifest. They stay bytes, which loader processes share, and
    each is parsed when it is asked for. A slice, or an array of numbers, gives those records."""

    def __init__(self, path, data, lines):
        self.path, self.data, self.lines = path, data, lines  # (n,2): where a line begins and ends

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, number):
        line = self.lines[number]
        if line.ndim == 2:
            return Manifest(self.path, self.data, line)
        record = _present(json.loads(self.data[slice(*line)]))
        for key, of in (("path", "video"), ("map_path", "maps")):
            if record.get(of):
                record[key] = os.path.join(os.path.dirname(self.path), record[of])
        return record


def read_manifest(path, split=None) -> Manifest:
    """Records of a manifest (JSON lines, one clip each) as dicts; with `split`, those of that split
    and those that name none. Adds `path` and `map_path`: `video` and `maps` with the manifest's
    folder in front. A value that is null or NaN is absent, as data frames write it.

    Raises UserError that names file and line for a line that is not such a record."""
    path, lines, end = Path(path), array.array("q"), 0
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a manifest: {error}") from error
    for number, line in enumerate(io.BytesIO(data), 1):
        start, end = end, end + len(line)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error}): {line[:60]}") from error
        if not isinstance(record, dict) or not record.get("video"):
            raise UserError(f'{path}:{number}: no "video" in {line[:60]}')
        record = _present(record)
        for what, (keys, fits) in VALUES.items():
            for key in keys & record.keys():
                if not fits(record[key]):
                    raise UserError(
                        f"{path}:{number}: {key} must be {what}, or absent: {record[key]!r}"
                    )
        own = record.get("split", split)
        if split not in (None, own) and own.strip().lower() == split.lower():
            raise UserError(f"{path}:{number}: split {own!r} is spelled unlike {split!r}")
        if split in (None, own):
            lines.extend((start, end))
    if not lines:
        if split is None:
            raise UserError(f"{path}: no clips")
        raise UserError(
            f"{path}: no clips of split {split!r}; captions.py index ... --test-share 0.2 makes a "
            "test split"
        )
    return Manifest(path, data, np.frombuffer(lines, np.int64).reshape(-1, 2))


def shared_clips(sides):
    """-> a text, if clips of one of the sides, {name: records}, are on another one, too: the same
    file, links followed, and pieces [start, end) of it that overlap. Else None."""
    resolve_folder = functools.cache(os.path.realpath)  # of 240,000 clips a few hundred folders
    earlier = {}  # file: [(start, end, side), ...] of the sides before
    for side, records in sides.items():
        pieces, shared = [], []
        for record in records:
            folder, name = os.path.split(record["path"])
            file = os.path.join(resolve_folder(folder), name)
            file = os.path.realpath(file) if os.path.islink(file) else file
            start, end = record.get("start", 0), record.get("end", math.inf)
            for first, stop, other in earlier.get(file, ()):
                if first < end and start < stop:
                    shared.append((record["video"], other))
                    break
            pieces.append((file, (start, end, side)))
        if shared:
            video, other = shared[0]
            return (
                f"{len(shared):,} of {len(records):,} clips of {side} are on another side, too, "
                f"such as {video}, also of {other}"
            )
        for file, piece in pieces:
            earlier.setdefault(file, []).append(piece)
    return None


def refuse_shared_clips(manifest, sides):
    """UserError if `sides` have shared_clips."""
    if shared := shared_clips(sides):
        raise UserError(
            f'{manifest}: {shared}. Give each clip one "split" (a clip without is of every split; '
            "captions.py index ... --test-share 0.2 draws a test split), or name another split"
        )


VIDEOS = set(".mp4 .mkv .webm .avi .mov .m4v .mpg .mpeg .ts .flv .wmv .3gp .ogv".split())
VIDEOS |= {".mts", ".m2ts", ".vob", ".divx"}
# Hidden files and folders, and what systems keep of deleted files, previews and snapshots.
HIDDEN = r"\..*|[$#@]recycle(\.bin)?|@eadir|__macosx|lost\+found|[~#]snapshot|system volume info.*"


def videos_under(root, others=None):
    """Videos below a folder, also through links; not hidden ones (.ipynb_checkpoints/a.mp4,
    ._a.mp4, @eaDir/a.mp4), nor those below a folder that is its own ancestor, by a link. Files of
    other kinds are added to the list `others`."""
    for folder, folders, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        above = {real, *real.parents, *(p.resolve() for p in Path(folder).parents)}
        folders[:] = sorted(name for name in folders if not re.fullmatch(HIDDEN, name, re.I))
        folders[:] = [name for name in folders if Path(folder, name).resolve() not in above]
        shown = sorted(name for name in names if not re.fullmatch(HIDDEN, name, re.I))
        yield from (Path(folder, name) for name in shown if Path(name).suffix.lower() in VIDEOS)
        if others is not None:
            others += [name for name in shown if Path(name).suffix.lower() not in VIDEOS]


# ==== Crop: one box and flip for frames, motion and text maps (4.2, Table 8) ======================
# The box is VideoMAE's GroupMultiScaleCrop.
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
    places = [(y, x) for y in range(5) for x in range(5) if y % 2 == x % 2]  # slack / 4
    y, x = places[draw(len(places))]
    top, left = y * ((size[0] - height) // 4), x * ((size[1] - width) // 4)
    return Crop(top, left, height, width, flip and draw(2) == 1)


def crop_frames(frames, crop, size):
    """(T,H,W,3) uint8 -> (3,T,size,size) uint8: cut, resized with antialiasing, mirrored."""
    video = TF.resized_crop(frames.permute(0, 3, 1, 2), *crop[:4], [size, size])  # (T,3,size,size)
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
    centres = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)  # (h,w,2) in -1..1
    cropped = F.grid_sample(
        similarity[None].float(), centres[None], padding_mode="border", align_corners=False
    )[0]  # (t,h,w)
    return cropped.flip(-1) if crop.flip else cropped


def map_scores(text_map, caption, frames, crop, size, grid):
    """Scores (t,h,w) of a crop from a TextMap, for its caption of that number: of the stored frame
    that is nearest to each of `frames`, the t tubelets' first ones. size: (height, width) that the
    crop is of."""
    nearest = (text_map.frames[:, None] - torch.tensor(frames)).abs().argmin(0)  # (t,)
    return crop_map(text_map.similarity[caption, nearest], crop, size, grid)
