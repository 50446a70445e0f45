# Copyright (c) 2026 The tgmae authors. MIT licence, see LICENSE: copy it, and keep this line.
"""Text-Guided Video Masked Autoencoder (Fan et al., ECCV 2024): the method in one file.

A video MAE that masks the cubes which CLIP finds most similar to the video's caption, and that can
align the mean of the visible cubes with the caption by a contrastive loss. In ten lines, with
`video` (B,3,16,224,224) uint8 and `captions`, for each video one of its three, at random (3.2):

    config = PRESETS["base"]
    model = TGMAE(config)
    clip, tokenizer = load_clip()  # ViT-B/32, frozen
    video = normalize(video)
    text = encode_text(clip, tokenizer, captions)  # (B,E)
    scores = text_scores(clip, video, text, config.patch_size, config.tubelet_size)  # (B,t,h,w)
    mask = topk_mask(scores, MASK_RATIOS["tgm"])  # (B,N)
    out = model(video, mask, text)
    loss = out["mae"] + 1.0 * out["vt"]  # (3.5); vt: video-text, 3.4. Pure MAE: out["mae"]
    loss.backward()

`torchrun train.py --mask tgm --vt` does the same on a toy world with a toy CLIP, in under 5 minutes
on 2 CPU cores; `mae` ends near 0.8 (all zeros: about 1). The sections; (1) to (4) are equations:

    Config (4.2) -> Cubes (3.1) -> Transformer (3.1: (1)) -> Maskers (3.1: (2), 3.3: top k)
        -> CLIP scores (3.3) -> Losses (3.1: MSE, 3.4: (4)) -> Model (3.1: (3), 3.4: mean, 3.5)

3.2, how captions are made, is in captions.py. Each section can be copied: its banner says what it
needs. Shapes, the same letters everywhere:

    B batch    T,H,W frames, height, width    C = 3    D embed_dim    Dd decoder_embed_dim
    t,h,w: t time slices of h*w cubes, t = T/tubelet_size, h = H/patch_size, w = W/patch_size
    N = t*h*w cubes, Nv of them visible, Nm masked    P = tubelet_size*patch_size**2*C values a cube
    E text_dim, the size of CLIP's embeddings    world: number of processes, each is a rank

A mask is (B,N) bool and True means MASKED, everywhere: what (2) selects, the visible, is ~mask.

Where we depart from section 3, or it says nothing (positions, norms, layers are VideoMAE's):
  - 3.3 scores and masks frames, a cube has tubelet_size of them: here its first frame scores it.
  - 3.3 takes the top k of a frame. Here k cubes are masked in each of the t time slices.
  - 3.3 takes CLIP's [CLS] and [EOS] states. Here they are projected, as CLIP compares them.
  - 3.1 embeds all cubes, then masks. Here masked cubes are dropped before: less work, same result.
  - 3.1 reconstructs the video. Here, as in VideoMAE, only masked cubes are predicted, and their
    target is each cube normalised, per channel, by its own mean and standard deviation.
  - 3.4: all other captions and videos are negatives. With `groups`, not those of the same video.
  - 3.4 gives no temperature (here 0.07), no layers of the head (here on the video side only).
"""

import math
import pickle
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from torchvision.ops import StochasticDepth

# ==================================================================================================
# Config: sizes (4.2: ViT-B, 16 frames; CLIP's text_dim; our temperature; the rest is VideoMAE's).
# Needs: math, dataclass, fields. Presets, but for toy: VideoMAE (Tong et al. 2022).
# ==================================================================================================


@dataclass(frozen=True)
class Config:
    """Sizes of the model. An impossible value is a ValueError that names it."""

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
    norm_pix_loss: bool = True  # target: cubes normalised by their own mean and std
    text_dim: int = 512
    temperature: float = 0.07  # of InfoNCE
    layer_norm_eps: float = 1e-6
    drop_path: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("drop_path", "norm_pix_loss") and not value > 0:
                raise ValueError(f"{field.name}={value}: must be positive")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}: must be in [0, 1)")
        for name, part in (
            ("image_size", "patch_size"),
            ("num_frames", "tubelet_size"),
            ("embed_dim", "num_heads"),
            ("decoder_embed_dim", "decoder_num_heads"),
        ):
            whole, divisor = getattr(self, name), getattr(self, part)
            if whole % divisor:
                raise ValueError(f"{name}={whole} is not divisible by {part}={divisor}")

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t,h,w): how many cubes along time, height and width."""
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def num_patches(self) -> int:
        """N = t*h*w."""
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:
        """P: values in one cube."""
        return self.tubelet_size * self.patch_size**2 * self.in_chans


def _preset(*sizes, **other):
    names = "embed_dim depth num_heads decoder_embed_dim decoder_depth decoder_num_heads"
    return Config(**dict(zip(names.split(), sizes)), **other)


PRESETS = {  # encoder: embed_dim, depth, num_heads; decoder: the same three
    "toy": _preset(128, 4, 4, 96, 2, 3, image_size=64, patch_size=8, num_frames=4, text_dim=64),
    "small": _preset(384, 12, 6, 192, 4, 3),
    "base": _preset(768, 12, 12, 384, 4, 6),  # the paper's backbone
    "large": _preset(1024, 24, 16, 512, 12, 8),
    "huge": _preset(1280, 32, 16, 640, 12, 8),
}

# ==================================================================================================
# Cubes: uint8 video -> normalised video <-> cubes; picking some of the cubes (3.1).
# Needs: torch.
# ==================================================================================================

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(video):
    """(B,3,T,H,W) uint8, else TypeError -> float32, standardised by ImageNet's mean and std, as in
    VideoMAE."""
    if video.dtype != torch.uint8:
        raise TypeError(f"video is {video.dtype}: must be uint8")
    mean, std = (
        video.new_tensor(value, dtype=torch.float32).view(3, 1, 1, 1)
        for value in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (video.float() / 255 - mean) / std


def patchify(video, patch_size, tubelet_size):
    """(B,C,T,H,W) -> cubes (B,N,P), a cube's values in the order (frame, row, column, channel), as
    in VideoMAE. ValueError if the video does not divide into cubes."""
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
    """(B,N,P) -> (B,C,T,H,W): the exact inverse of patchify. ValueError if N or P do not fit."""
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
    """mask (B,N) bool, True = masked -> ids_keep (B,Nv), ids_mask (B,Nm), ascending, on `device`.

    ValueError if the rows mask different numbers of cubes. The CPU must know these numbers, which
    decide shapes: keep masks there, since for a mask on the GPU it would have to wait."""
    counts = mask.sum(1).tolist()
    if mask.dtype != torch.bool or len(set(counts)) != 1 or not 0 < counts[0] < mask.shape[1]:
        raise ValueError(
            f"mask {mask.dtype} {tuple(mask.shape)} masks {counts} cubes a video: must be bool, "
            "the same number in each, and neither none nor all"
        )
    ids_keep, ids_mask = (m.nonzero()[:, 1].view(len(mask), -1) for m in (~mask, mask))
    to_gpu = "cuda" in str(device)  # elsewhere the source may be gone before it is copied
    return ids_keep.to(device, non_blocking=to_gpu), ids_mask.to(device, non_blocking=to_gpu)


def take(x, ids):
    """x (B,N,any), ids (B,K) -> (B,K,any): row b is x[b, ids[b]]."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


# ==================================================================================================
# Transformer: cubes (B,N,P) -> Encoder (B,Nv,D); tokens (B,N,Dd) -> Decoder (B,Nm,P).
# Needs: torch, torch.nn as nn, torch.nn.functional as F, checkpoint, StochasticDepth.
# Encoder also needs: take (Cubes). Paper: 3.1, 4.2. Names and order: VideoMAE's
# modeling_finetune.py and modeling_pretrain.py.
# ==================================================================================================


class Attention(nn.Module):
    """Joint self-attention over all tokens, of space and time: (B,L,D) -> (B,L,D), L = Nv or N."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)  # VideoMAE's names: one matrix, two biases
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        # k has no bias: it would add the same to all scores of a query, and the softmax drops that.
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # (3D,)
        qkv = F.linear(x, self.qkv.weight, bias)  # (B,L,3D)
        heads = (part.view(B, L, self.num_heads, -1) for part in qkv.chunk(3, dim=-1))
        q, k, v = (part.transpose(1, 2) for part in heads)  # each (B,heads,L,D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B,heads,L,D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))  # (B,L,D)


class Mlp(nn.Module):
    """(B,L,D) -> (B,L,D): Linear, GELU, Linear."""

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
    for block in blocks:  # checkpoint: less memory, the forward runs twice
        x = checkpoint(block, x, use_reentrant=False) if grad_checkpointing else block(x)
    return x


def sinusoid(count, dim):
    """-> (count,dim): VideoMAE's fixed sine-cosine table over the cubes' flattened index."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class PatchEmbed(nn.Module):
    """Cubes (B,Nv,P) -> embeddings (B,Nv,D): VideoMAE's Conv3d, as the matrix product it is."""

    def __init__(self, patch_dim, embed_dim):
        super().__init__()
        self.proj = nn.Linear(patch_dim, embed_dim)

    def forward(self, cubes):
        return self.proj(cubes)  # equation (1)


class Encoder(nn.Module):
    """Cubes (B,N,P), ids_keep (B,Nv) -> (B,Nv,D), after the final norm; ids_keep None: (B,N,D)."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.patch_embed = PatchEmbed(c.patch_dim, c.embed_dim)
        self.register_buffer("pos_embed", sinusoid(c.num_patches, c.embed_dim), persistent=False)
        rates = [i * c.drop_path / max(1, c.depth - 1) for i in range(c.depth)]  # more when deeper
        self.blocks = nn.ModuleList(
            Block(c.embed_dim, c.num_heads, c.mlp_ratio, c.layer_norm_eps, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.layer_norm_eps)
        self.grad_checkpointing = False

    def forward(self, cubes, ids_keep=None):
        pos = self.pos_embed  # (N,D)
        if ids_keep is not None:
            cubes, pos = take(cubes, ids_keep), pos[ids_keep]  # (2) applied: (B,Nv,P), (B,Nv,D)
        x = self.patch_embed(cubes)  # (B,Nv,D)
        x = x + pos.to(x.dtype)  # under autocast x and all residual sums are 16-bit, as in VideoMAE
        return self.norm(_run_blocks(self.blocks, x, self.grad_checkpointing))


class Decoder(nn.Module):
    """Tokens (B,N,Dd), positions added, the masked ones last -> predicted masked cubes (B,Nm,P)."""

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


# ==================================================================================================
# Maskers: scores (B,t,h,w) -> mask (B,N). Every mask is the top k of scores: noise (tube), motion
# (mgm, motion-guided) or similarity to the caption (tgm, text-guided: text_scores, next section).
# Needs: torch. motion_scores also needs: torch.nn.functional as F.
# Paper: 3.1, 3.3; tube: VideoMAE; mgm: Fan et al., MGM (ICCV 2023).
# ==================================================================================================

MASK_RATIOS = {"tube": 0.9, "mgm": 0.75, "tgm": 0.6}  # VideoMAE, MGM, Figure 3(a): see 4.6


def topk_mask(scores, mask_ratio, *, bottom_k=False, generator=None):
    """scores (B,t,h,w) -> mask (B,N) in order t,h,w, True = masked (3.3): the int(mask_ratio*h*w)
    highest scores of every time slice (bottom_k: the lowest, Figure 3(b)), ties broken at random.
    ValueError for other shapes, NaN, and a ratio that masks no cube of a slice, or every cube."""
    if scores.ndim != 4 or scores.isnan().any():
        raise ValueError(f"scores {tuple(scores.shape)}: must be (B,t,h,w), without NaN")
    h, w = scores.shape[2:]
    k = int(mask_ratio * h * w)
    if not 0 < k < h * w:
        raise ValueError(f"mask_ratio={mask_ratio} masks {k} of {h * w} patches in a slice")
    scores = scores.flatten(2)  # (B,t,h*w)
    # A top k, in which chance decides among equals (where nothing moves, all scores are 0): each
    # slice is shuffled, then sorted, and its first k places are looked up in the shuffle.
    noise = torch.rand(scores.shape, generator=generator, device=(generator or scores).device)
    shuffle = noise.argsort(-1).to(scores.device)  # (B,t,h*w): the cube at each place
    places = scores.gather(-1, shuffle).argsort(-1, descending=not bottom_k)[..., :k]  # (B,t,k)
    top_k = shuffle.gather(-1, places)  # (B,t,k): the cubes at these places
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top_k, True)  # the mask of (2)
    return mask.flatten(1)  # (B,N)


def tube_scores(batch, grid, *, generator=None):
    """-> (B,t,h,w): noise shared over time, so that a place is masked in all slices or in none."""
    t, h, w = grid
    device = generator.device if generator else None
    noise = torch.rand(batch, 1, h, w, generator=generator, device=device)
    return noise.expand(batch, t, h, w)


def motion_scores(motion, grid):
    """motion (B,T,h',w'), lengths of vectors; grid = (t,h,w) -> (B,t,h,w), as in MGM: the mean over
    a cube's frames and cells, by adaptive average pooling. ValueError if t does not divide T."""
    T, t = motion.shape[1], grid[0]
    if T % t:
        raise ValueError(f"motion of {T} frames does not divide into {t} time slices")
    return F.adaptive_avg_pool3d(motion.float(), grid)


# ==================================================================================================
# CLIP scores: captions -> text (B,E); video, text -> scores (B,t,h,w) for topk_mask. CLIP is any
# model of open_clip.create_model (which sets visual.preprocess_cfg), frozen, in eval mode.
# Needs: torch, torch.nn.functional as F. load_clip also needs: pickle. text_scores also needs:
# IMAGENET_MEAN, IMAGENET_STD (Cubes). Its video is as normalize makes it. Paper: 3.3.
# ==================================================================================================


def bf16_is_fast(device) -> bool:
    """Whether bf16 pays here: on GPUs since Ampere, and on CPUs with bf16 matrix units."""
    kind = torch.device(device).type
    if kind != "cpu":
        return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities()
    return bool(has.get("amx_bf16") or has.get("avx512_bf16"))


def load_clip(name="ViT-B-32-quickgelu", pretrained="openai", device="cpu"):
    """-> (clip, tokenizer): a frozen open_clip model in eval mode, its image tower in bf16 where
    that is fast.

    name: a model of open_clip, hf-hub:REPO, or local-dir:FOLDER; pretrained: a tag of open_clip or
    a file of weights, ignored for the last two. Plain ViT-B-32 would run OpenAI's weights with the
    wrong activation. ValueError that names weights that are missing or cannot be loaded."""
    import open_clip  # here: it takes seconds, and a run without CLIP does not need it

    tag = None if name.startswith(("local-dir:", "hf-hub:")) else str(pretrained)
    try:
        # Without require_pretrained a missing file means random weights and a mere warning.
        clip = open_clip.create_model(name, tag, device=device, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"CLIP {name}, weights {pretrained}: {reason}") from error
    if bf16_is_fast(device):  # the weights: autocast would turn off attention's fast path
        clip.visual.to(torch.bfloat16)
    return clip.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def patch_embeddings(clip, frames, patch_size, *, chunk=256):
    """frames (B*t,3,H,W) in [0,1], H and W multiples of patch_size -> (B*t,h,w,E) float32 unit
    vectors: every patch is resized to CLIP's input size and embedded (its [CLS] state, projected).
    CLIP runs on `chunk` patches at a time, to bound the memory."""
    count, C, H, W = frames.shape
    h, w = H // patch_size, W // patch_size
    patches = frames.reshape(count, C, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(-1, C, patch_size, patch_size)  # (B*t*h*w,3,patch_size,patch_size)

    cfg = clip.visual.preprocess_cfg
    mean, std = (frames.new_tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    size, mode, embeddings = clip.visual.image_size, cfg.get("interpolation", "bicubic"), []
    dtype = next(p for p in clip.visual.parameters() if p.ndim == 4).dtype  # the convolution's
    for part in patches.split(chunk):
        part = F.interpolate(part, size, mode=mode, align_corners=False)  # bicubic overshoots
        embedding = clip.encode_image(((part.clamp(0, 1) - mean) / std).to(dtype))  # (chunk,E)
        embeddings.append(F.normalize(embedding.float(), dim=-1))
    return torch.cat(embeddings).view(count, h, w, -1)  # (B*t,h,w,E)


@torch.no_grad()
def encode_text(clip, tokenizer, captions):
    """List of B strings -> text (B,E) float32 unit vectors, on CLIP's device: [EOS], projected."""
    if isinstance(captions, str):
        raise TypeError(f"captions is the text {captions!r}: must be a list")
    device = next(clip.parameters()).device
    return F.normalize(clip.encode_text(tokenizer(list(captions)).to(device)).float(), dim=-1)


def text_scores(clip, video, text, patch_size, tubelet_size, *, chunk=256):
    """The scores of text-guided masking (3.3): cosine similarity of every patch of each tubelet's
    first frame and the caption. T, H, W must be multiples of the sizes.

    video (B,3,T,H,W): of `normalize`; other scales give other scores, unnoticed. text (B,E): of
    encode_text. -> (B,t,h,w) float32. chunk: patches that CLIP sees at a time."""
    if not video.is_floating_point():
        raise ValueError(f"video is {video.dtype}: normalize makes it what is asked for")
    frames = video[:, :, ::tubelet_size].transpose(1, 2)  # (B,t,3,H,W)
    mean, std = (video.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    frames = (frames * std + mean).clamp(0, 1)  # CLIP has a mean and std of its own
    visual = patch_embeddings(clip, frames.flatten(0, 1), patch_size, chunk=chunk)  # (B*t,h,w,E)
    visual, text = visual.unflatten(0, frames.shape[:2]), F.normalize(text.float(), dim=-1)
    with torch.autocast(visual.device.type, enabled=False):
        return torch.einsum("bthwe,be->bthw", visual, text)  # (B,t,h,w)


# ==================================================================================================
# Losses: MSE on the masked cubes; InfoNCE between videos and captions, over all ranks.
# Needs: torch, torch.nn.functional as F.
# Reconstruction also needs: patchify, split_mask, take, IMAGENET_MEAN, IMAGENET_STD (Cubes).
# ContrastiveHead (from _Gather on) also needs: torch.distributed as dist, torch.nn as nn.
# Paper: 3.1, 3.4; the target: VideoMAE's engine_for_pretraining.py; the head: after SimCLR's.
# ==================================================================================================


def reconstruction_target(video, mask, config):
    """video (B,3,T,H,W) ImageNet-normalised, mask (B,N) -> target (B,Nm,P); mean, std (B,Nm,1,3).

    Pixels are brought back to [0,1]; then each cube is normalised per channel over its own pixels
    (unbiased variance, std + 1e-6). Back to pixels: target.unflatten(-1, (-1, 3)) * std + mean."""
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
    """pred (B,Nm,P), in ascending order of cube; video (B,3,T,H,W) ImageNet-normalised; mask (B,N),
    True = masked -> scalar, of the video's dtype: mean squared error of the masked cubes (3.1)."""
    with torch.no_grad():
        target, _, _ = reconstruction_target(video, mask, config)
    return F.mse_loss(pred.to(target.dtype), target)  # the MSE of 3.1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        return torch.cat(parts)  # (world*B,...)

    @staticmethod
    def backward(ctx, grad):
        # Every rank computes the same loss over the rows of all ranks. The sum over ranks of the
        # gradient of this rank's rows is thus `world` times the true one; DDP divides by `world`
        # when it averages the gradients of the weights over the ranks.
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may share this tensor
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]  # (B,...)


def gather(x):
    """x (B,...) on each rank, B the same on all -> (world*B,...): the rows of all ranks, in rank
    order, with a gradient that DDP's mean makes right. On a single process: x itself."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _Gather.apply(x)


def info_nce(video_emb, text_emb, temperature, *, groups=None):
    """InfoNCE (3.4), -log(exp(q.k+/tau) / sum over all k of exp(q.k/tau)), of the rows given, none
    is gathered: the mean of video -> text and text -> video.

    video_emb, text_emb (B,E), a pair per row, normalised here. groups: tensor (B,) of ints, alike
    on all ranks: clips of one group (one video) are not negatives. -> scalar, float32 or wider."""
    with torch.autocast(video_emb.device.type, enabled=False):
        dtype = torch.promote_types(video_emb.dtype, torch.float32)
        video_emb = F.normalize(video_emb.to(dtype), dim=-1)
        text_emb = F.normalize(text_emb.to(dtype), dim=-1)
        logits = video_emb @ text_emb.T / temperature  # (B,B) cosine similarities / temperature
        if groups is not None:
            same = groups[:, None] == groups[None, :]
            same.fill_diagonal_(False)
            logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(len(logits), device=logits.device)  # the pairs are on the diagonal
        both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)  # (4), both ways
        return both / 2


class ContrastiveHead(nn.Sequential):
    """The prediction head (TGMAE.predictor) with global batch norm, and InfoNCE over all ranks
    (3.4). To copy: from _Gather to here. head(pooled): (B,D) -> (B,E), what is compared with text.

        head = ContrastiveHead(768, 512)  # in TGMAE, _init_weights makes it Xavier
        loss = head.loss(latent.mean(1), text)  # (B,D) and (B,E) of this rank -> scalar

    Gather first, then the predictor: its BatchNorm sees the embeddings of all ranks (the "global
    batch norm") and needs no SyncBatchNorm; with gather(head(pooled)) each rank would have its own.
    All ranks must call `loss`, with the same B, in the forward of the model that DDP wraps."""

    def __init__(self, embed_dim, text_dim, temperature=0.07):
        super().__init__(
            nn.Linear(embed_dim, embed_dim),
            nn.BatchNorm1d(embed_dim),
            nn.ReLU(inplace=True),
            nn.Linear(embed_dim, text_dim),
        )
        self.temperature = temperature

    def loss(self, pooled, text, groups=None):
        """pooled (B,D), text (B,E), groups (B,) or None (see info_nce), of this rank -> InfoNCE of
        the whole batch (world*B > 1 clips), a scalar, the same on every rank."""
        groups = None if groups is None else gather(groups)
        video_emb = self(gather(pooled))  # (world*B,E)
        return info_nce(video_emb, gather(text), self.temperature, groups=groups)


# ==================================================================================================
# Model: video (B,3,T,H,W), mask (B,N), text (B,E) -> the two losses of 3.5 (Figure 2).
# Needs: torch, torch.nn as nn; Config (Config); patchify, split_mask (Cubes); Decoder, Encoder,
# sinusoid (Transformer); ContrastiveHead, reconstruction_loss (Losses).
# ==================================================================================================


class TGMAE(nn.Module):
    """Video MAE with an optional video-text contrastive loss on the visible tokens."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = c = config
        self.encoder = Encoder(c)
        self.encoder_to_decoder = nn.Linear(c.embed_dim, c.decoder_embed_dim, bias=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, c.decoder_embed_dim))
        pos_embed = sinusoid(c.num_patches, c.decoder_embed_dim)
        self.register_buffer("pos_embed", pos_embed, persistent=False)  # the decoder's
        self.decoder = Decoder(c)
        self.predictor = ContrastiveHead(c.embed_dim, c.text_dim, c.temperature)  # used with text
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
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"video has shape {tuple(video.shape)}, the model takes (B, {wanted})")
        if mask is not None and mask.shape != (len(video), c.num_patches):
            cubes = f"({len(video)}, {c.num_patches}) cubes"
            raise ValueError(f"mask has shape {tuple(mask.shape)}, this video has {cubes}")

    def encode(self, video, mask=None):
        """video (B,3,T,H,W) ImageNet-normalised, mask (B,N), True = masked -> (B,Nv,D) after the
        final norm; without a mask (B,N,D). ValueError if the shapes do not fit."""
        self._check(video, mask)
        ids_keep = None if mask is None else split_mask(mask, video.device)[0]
        cubes = patchify(video, self.config.patch_size, self.config.tubelet_size)  # (B,N,P)
        return self.encoder(cubes, ids_keep)

    def decode(self, latent, mask):
        """latent (B,Nv,D) of the visible cubes, mask (B,N) -> predicted masked cubes (B,Nm,P)."""
        ids_keep, ids_mask = split_mask(mask, latent.device)
        visible = self.encoder_to_decoder(latent)  # (B,Nv,Dd)
        visible = visible + self.pos_embed[ids_keep].to(visible.dtype)  # (B,Nv,Dd)
        masked = self.mask_token + self.pos_embed[ids_mask]  # (B,Nm,Dd)
        x = torch.cat([visible, masked.to(visible.dtype)], dim=1)  # (B,N,Dd), visible first
        return self.decoder(x, ids_mask.shape[1])

    def forward(self, video, mask, text=None, *, mae=True, watch=False, groups=None):
        """video (B,3,T,H,W) ImageNet-normalised; mask (B,N), True = masked, best on the CPU (see
        split_mask); text (B,E) or None -> dict: `pred` (B,Nm,P) and the scalar `mae`, both absent
        with mae=False (no decoder runs); the scalar `vt`, absent without text. The caller adds them
        up: mae, or mae + weight * vt (3.5). ValueError if the shapes do not fit.

        watch: the contrastive loss trains the predictor, not the encoder (how we read Figure 4).
        groups: see info_nce."""
        latent = self.encode(video, mask)  # (B,Nv,D): the encoder of (3)
        out = {}
        if mae:
            out["pred"] = self.decode(latent, mask)  # (B,Nm,P): the decoder of (3)
            out["mae"] = reconstruction_loss(out["pred"], video, mask, self.config)
        if text is not None:
            pooled = latent.mean(dim=1)  # (B,D): of the visible cubes, 3.4's "all patches"
            out["vt"] = self.predictor.loss(pooled.detach() if watch else pooled, text, groups)
        return out
