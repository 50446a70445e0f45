# Copyright (c) 2026 The tgmae authors. MIT licence, see LICENSE: copy it, and keep this line.
"""Text-Guided Video Masked Autoencoder (Fan et al., ECCV 2024): the method in one file.

A video MAE that masks the cubes which CLIP finds most similar to the video's caption, and that can
align the mean of the visible cubes with the caption by a contrastive loss. In ten lines, with
`video` (B,3,16,224,224) uint8 and `captions`, for each video one of its three, at random (3.2):

    config = PRESETS["base"]
    video = normalize(video)
    clip, tokenizer = load_clip()  # ViT-B/32, frozen
    text = encode_text(clip, tokenizer, captions)  # (B,E)
    scores = text_scores(clip, video, text, config.patch_size, config.tubelet_size)  # (B,t,h,w)
    mask = topk_mask(scores.cpu(), MASK_RATIOS["tgm"])  # (B,N)
    model = TGMAE(config)
    out = model(video, mask, text)
    loss = out["mae"] + out["vt"]  # 3.5; vt: video-text, 3.4. Pure MAE: no text, out["mae"]
    loss.backward()

`torchrun train.py --mask tgm --vt` does the same on a toy world with a toy CLIP, in under 5 minutes
on 2 CPU cores; `mae` ends near 0.8, where predicting zeros gives about 1. Where each section and
equation of the paper is:

    3.1 (1)  PatchEmbed.forward                       MSE  reconstruction_loss
    3.1 (2)  topk_mask, applied in Encoder.forward    3.4  ContrastiveHead, on TGMAE.forward's mean
    3.1 (3)  TGMAE.encode, TGMAE.decode               (4)  info_nce
    3.3      text_scores, topk_mask                   3.5  the sum in the ten lines
    3.2, making captions, is in captions.py; the evaluations of 3.5 are in eval.py

Shapes: B batch; T,H,W frames, height, width; C = 3; t,h,w = T/tubelet_size, H/patch_size,
W/patch_size, the grid of cubes (in the paper t,h,w is the size of a cube); N = t*h*w cubes, Nv of
them visible, Nm masked; P = tubelet_size*patch_size**2*C values in a cube; D embed_dim;
Dd decoder_embed_dim; E text_dim, the size of CLIP's embeddings. A mask is (B,N) bool and True means
MASKED, everywhere: what (2) selects, the visible, is ~mask.

Where we depart from section 3, or it is silent (positions, norms, layers are VideoMAE's):
  - 3.1 embeds all cubes, then masks. Here masked cubes are dropped before: the same result.
  - 3.1 reconstructs the video. Here, as in VideoMAE, masked cubes are predicted, and the target is
    each cube normalised, per channel, by its own mean and standard deviation.
  - 3.1 names three maskers. Random: scores are torch.rand(B,1,t*h,w), all cubes in one slice. Tube
    is VideoMAE's. MGM we know from this paper alone: masking most mean motion is our reading.
  - 3.3 scores and masks frames: here a cube's first frame scores it, and k cubes of each time slice
    are masked, k rounded down. Ties (black borders) are broken by torch.topk, not at random.
  - 3.3 resizes patches, we do not know of which size nor how: here the cubes' own, by torch's
    bicubic interpolation (CLIP's is Pillow's), clamped to [0,1]. [CLS] and [EOS] are projected.
  - 3.3 scores the clip's frames, as text_scores does. train.py may read scores made beforehand, of
    every 8th frame, uncropped: the largest departure (docs/data.md measures how many cubes change).
  - 3.4 pools "all patches": here the visible ones, all that the encoder sees, after its final norm.
  - 3.4 does not say which text embedding (here 3.3's of CLIP, frozen), which temperature (0.07) nor
    which layers (Linear, BatchNorm, ReLU, Linear, for the video alone). We average (4) both ways.
  - 3.4: all others are negatives. With `groups`, not other clips of the same video (--repeat).
"""

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ==== Config: sizes (4.2): VideoMAE's, but for CLIP's text_dim and our temperature ================
@dataclass(frozen=True)
class Config:
    """Sizes of the model. That they are positive is not checked."""

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 16
    tubelet_size: int = 2
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    decoder_embed_dim: int = 384
    decoder_depth: int = 4
    decoder_num_heads: int = 6
    text_dim: int = 512
    temperature: float = 0.07  # of InfoNCE
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        assert self.image_size % self.patch_size == 0, f"image_size, patch_size: {self}"
        assert self.num_frames % self.tubelet_size == 0, f"num_frames, tubelet_size: {self}"
        assert self.embed_dim % self.num_heads == 0, f"embed_dim, num_heads: {self}"
        assert self.decoder_embed_dim % self.decoder_num_heads == 0, f"decoder_embed_dim: {self}"

    @property
    def grid(self) -> tuple[int, int, int]:  # (t,h,w)
        side = self.image_size // self.patch_size
        return self.num_frames // self.tubelet_size, side, side

    @property
    def num_patches(self) -> int:  # N
        return math.prod(self.grid)

    @property
    def patch_dim(self) -> int:  # P
        return self.tubelet_size * self.patch_size**2 * 3


PRESETS = {  # all but toy: VideoMAE's (Tong et al. 2022)
    "toy": Config(image_size=64, patch_size=8, num_frames=4, embed_dim=128, depth=4, num_heads=4,
                  decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=3, text_dim=64),
    "small": Config(embed_dim=384, num_heads=6, decoder_embed_dim=192, decoder_num_heads=3),
    "base": Config(),  # the paper's backbone
    "large": Config(embed_dim=1024, depth=24, num_heads=16, decoder_embed_dim=512, decoder_depth=12,
                    decoder_num_heads=8),
    "huge": Config(embed_dim=1280, depth=32, num_heads=16, decoder_embed_dim=640, decoder_depth=12,
                   decoder_num_heads=8),
}  # fmt: skip

# ==== Cubes: uint8 video -> normalised video <-> cubes (3.1) ======================================
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalize(video):
    """(B,3,T,H,W) uint8 (or a TypeError) -> float32, by ImageNet's mean and std, as in VideoMAE."""
    if video.dtype != torch.uint8:
        raise TypeError(f"video is {video.dtype}: must be uint8")
    mean = torch.tensor(IMAGENET_MEAN, device=video.device).view(3, 1, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=video.device).view(3, 1, 1, 1)
    return (video.float() / 255 - mean) / std


def denormalize(video):
    """(B,3,T,H,W) as normalize makes it -> pixels in [0,1]."""
    assert video.is_floating_point(), f"video is {video.dtype}: normalize makes a float"
    mean, std = video.new_tensor(IMAGENET_MEAN), video.new_tensor(IMAGENET_STD)  # (3,)
    return video * std.view(3, 1, 1, 1) + mean.view(3, 1, 1, 1)


def patchify(video, patch_size, tubelet_size):
    """(B,C,T,H,W) -> cubes (B,N,P), values in VideoMAE's order: frame, row, column, channel."""
    B, C, T, H, W = video.shape
    t, h, w = T // tubelet_size, H // patch_size, W // patch_size  # must divide, or reshape fails
    x = video.reshape(B, C, t, tubelet_size, h, patch_size, w, patch_size)
    x = x.permute(0, 2, 4, 6, 3, 5, 7, 1)  # (B, t,h,w, frame,row,column, C)
    return x.reshape(B, t * h * w, tubelet_size * patch_size**2 * C)  # (B,N,P)


def unpatchify(patches, grid, patch_size, tubelet_size):
    """(B,N,P) -> (B,C,T,H,W): the exact inverse of patchify."""
    t, h, w = grid
    assert patches.shape[1] == t * h * w, f"patches {tuple(patches.shape)} of a grid {t}x{h}x{w}"
    x = patches.reshape(len(patches), t, h, w, tubelet_size, patch_size, patch_size, -1)
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B,C, t,frame, h,row, w,column)
    return x.reshape(len(x), -1, t * tubelet_size, h * patch_size, w * patch_size)


# ==== CLIP scores: captions -> text (B,E); video, text -> scores (B,t,h,w) (3.3) ==================
def load_clip(name="ViT-B-32-quickgelu", pretrained="openai", device="cpu"):
    """-> (clip, tokenizer) of open_clip, frozen, in eval mode. name: a model, or hf-hub:REPO or
    local-dir:FOLDER, which hold weights; pretrained: the model's tag, or a file. Plain "ViT-B-32"
    would run OpenAI's weights with the wrong activation."""
    import open_clip  # here: it takes seconds, and a run without CLIP does not need it

    # Without require_pretrained a missing file means random weights and a mere warning.
    tag = None if name.startswith(("local-dir:", "hf-hub:")) else str(pretrained)
    clip = open_clip.create_model(name, tag, device=device, require_pretrained=True)
    return clip.eval().requires_grad_(False), open_clip.get_tokenizer(name)


@torch.no_grad()
def encode_text(clip, tokenizer, captions):
    """List of B strings -> text (B,E) float32 unit vectors, on CLIP's device: [EOS], projected."""
    if isinstance(captions, str):
        raise TypeError(f"captions is the text {captions!r}: must be a list")
    tokens = tokenizer(list(captions)).to(next(clip.parameters()).device)
    return F.normalize(clip.encode_text(tokens).float(), dim=-1)


@torch.no_grad()
def patch_embeddings(clip, frames, patch_size, *, chunk=256):
    """frames (n,3,H,W) in [0,1] -> (n,h,w,E) float32 unit vectors: each patch is resized to CLIP's
    input and embedded by itself ([CLS], projected), `chunk` at a time, to bound the memory."""
    n, C, H, W = frames.shape
    h, w = H // patch_size, W // patch_size
    patches = frames.reshape(n, C, h, patch_size, w, patch_size).permute(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(-1, C, patch_size, patch_size)  # (n*h*w,3,patch_size,patch_size)
    cfg, size = clip.visual.preprocess_cfg, clip.visual.image_size
    mean = frames.new_tensor(cfg["mean"]).view(3, 1, 1)
    std = frames.new_tensor(cfg["std"]).view(3, 1, 1)
    dtype = next(p for p in clip.visual.parameters() if p.ndim == 4).dtype  # bf16, perhaps
    embeddings = []
    for part in patches.split(chunk):
        part = F.interpolate(part, size, mode=cfg["interpolation"], align_corners=False).clamp(0, 1)
        embedding = clip.encode_image(((part - mean) / std).to(dtype))  # (chunk,E)
        embeddings.append(F.normalize(embedding.float(), dim=-1))
    return torch.cat(embeddings).view(n, h, w, -1)  # (n,h,w,E)


def text_scores(clip, video, text, patch_size, tubelet_size, *, chunk=256):
    """Cosine similarity of the caption and every patch of each tubelet's first frame (3.3).
    video (B,3,T,H,W): of normalize; one in [0,1] is not detected. text (B,E): of encode_text ->
    (B,t,h,w) float32. chunk: patches in CLIP at a time."""
    assert len(text) == len(video), f"{len(text)} texts of {len(video)} videos"
    assert video.shape[2] % tubelet_size == 0, f"{video.shape[2]} frames in tubelets {tubelet_size}"
    firsts = denormalize(video[:, :, ::tubelet_size])  # (B,3,t,H,W)
    frames = firsts.transpose(1, 2).flatten(0, 1).clamp(0, 1)  # (B*t,3,H,W)
    visual = patch_embeddings(clip, frames, patch_size, chunk=chunk)  # (B*t,h,w,E)
    visual = visual.unflatten(0, (len(video), -1))  # (B,t,h,w,E)
    return F.cosine_similarity(visual, text[:, None, None, None].float(), dim=-1)  # (B,t,h,w)


# ==== Top k: scores (B,t,h,w) -> mask (B,N) -> which cubes are visible, which masked (3.3) ========
MASK_RATIOS = {"tube": 0.9, "mgm": 0.75, "tgm": 0.6}  # 4.6: best for VideoMAE, MGM, TGM


def topk_mask(scores, mask_ratio, *, bottom_k=False):
    """scores (B,t,h,w), no NaN -> mask (B,N) in order t,h,w, True = masked: of each time slice the
    k = int(mask_ratio*h*w) highest (bottom_k: the lowest, Figure 3(b)), whatever the masker."""
    assert not scores.isnan().any(), "there is NaN in the scores"
    scores = scores.flatten(2)  # (B,t,h*w)
    k = int(mask_ratio * scores.shape[-1])
    top_k = scores.topk(k, largest=not bottom_k).indices  # (B,t,k)
    mask = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, top_k, True)  # (2) selects ~mask
    return mask.flatten(1)  # (B,N)


def split_mask(mask, device=None):
    """mask (B,N) bool, True = masked -> ids_keep (B,Nv), ids_mask (B,Nm), ascending, on `device`.
    Keep masks on the CPU: with one on a GPU, tolist and nonzero stop the CPU until it is done."""
    assert mask.dtype == torch.bool, f"mask is {mask.dtype}: must be bool"
    counts = mask.sum(1).tolist()
    assert len(set(counts)) == 1 and 0 < counts[0] < mask.shape[1], (
        f"masks {counts} of {mask.shape[1]} cubes: must be equal, and neither none nor all"
    )
    ids_keep = (~mask).nonzero()[:, 1].view(len(mask), -1)
    ids_mask = mask.nonzero()[:, 1].view(len(mask), -1)
    to_gpu = "cuda" in str(device)  # only then need the copy not be waited for
    return ids_keep.to(device, non_blocking=to_gpu), ids_mask.to(device, non_blocking=to_gpu)


def take(x, ids):
    """x (B,N,any), ids (B,K) -> (B,K,any): row b is x[b, ids[b]]."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


# ==== Noise and motion: scores of tube and motion-guided masking (3.1) ============================
def tube_scores(batch, grid, *, generator=None):
    """-> (B,t,h,w): noise shared by all slices, so a place is masked in all of them or in none."""
    t, h, w = grid
    return torch.rand(batch, 1, h, w, generator=generator).expand(batch, t, h, w)


def motion_scores(motion, grid, *, generator=None):
    """motion (B,T,h',w'), lengths of motion vectors in pixels; grid (t,h,w), t divides T ->
    (B,t,h,w): the mean over a cube's frames and the cells that it touches. Chance decides where
    nothing moves, by noise of at most 1e-4 pixels (generator: of the CPU)."""
    assert motion.shape[1] % grid[0] == 0, f"{motion.shape[1]} frames in {grid[0]} time slices"
    scores = F.adaptive_avg_pool3d(motion.float(), grid)
    return scores + 1e-4 * torch.rand(scores.shape, generator=generator).to(scores.device)


# ==== Transformer: cubes -> Encoder (B,Nv,D); tokens -> Decoder (B,Nm,P) (3.1) ====================
# Names of weights are those of VideoMAE's modeling_pretrain.py; weights.py translates its files.
class PatchEmbed(nn.Module):
    """Cubes (B,Nv,P) -> embeddings (B,Nv,D): VideoMAE's Conv3d, as the matrix product it is."""

    def __init__(self, patch_dim, embed_dim):
        super().__init__()
        self.proj = nn.Linear(patch_dim, embed_dim)

    def forward(self, cubes):
        return self.proj(cubes)  # equation (1)


class Attention(nn.Module):
    """Self-attention over all tokens, of space and time: (B,L,D) -> (B,L,D), L = Nv or N."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        # As in VideoMAE, one matrix, and biases for q and v: softmax cancels what k's would add.
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, L, D = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])  # (3D,)
        qkv = F.linear(x, self.qkv.weight, bias).view(B, L, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B,heads,L,D/heads)
        x = F.scaled_dot_product_attention(q, k, v)  # (B,heads,L,D/heads)
        return self.proj(x.transpose(1, 2).reshape(B, L, D))  # (B,L,D)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then MLP, each with a residual."""

    def __init__(self, dim, num_heads, mlp_ratio, eps):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads)
        fc1, fc2 = nn.Linear(dim, int(dim * mlp_ratio)), nn.Linear(int(dim * mlp_ratio), dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU(), fc2=fc2))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def sinusoid(count, dim):
    """-> (count,dim): VideoMAE's fixed sine-cosine table over the cubes' flattened index."""
    position = torch.arange(count, dtype=torch.float64)[:, None]
    channel = torch.arange(dim, dtype=torch.float64)
    angle = position / 10000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


class Encoder(nn.Module):
    """Cubes (B,N,P), ids_keep (B,Nv) -> (B,Nv,D), after the final norm; ids_keep None: (B,N,D)."""

    def __init__(self, c):  # c: Config
        super().__init__()
        self.patch_embed = PatchEmbed(c.patch_dim, c.embed_dim)
        self.register_buffer("pos_embed", sinusoid(c.num_patches, c.embed_dim), persistent=False)
        sizes = c.embed_dim, c.num_heads, c.mlp_ratio, c.layer_norm_eps
        self.blocks = nn.Sequential(*[Block(*sizes) for _ in range(c.depth)])
        self.norm = nn.LayerNorm(c.embed_dim, eps=c.layer_norm_eps)

    def forward(self, cubes, ids_keep=None):
        pos = self.pos_embed  # (N,D)
        if ids_keep is not None:
            cubes, pos = take(cubes, ids_keep), pos[ids_keep]  # (2) applied: (B,Nv,P), (B,Nv,D)
        x = self.patch_embed(cubes)  # (B,Nv,D), or (B,N,D)
        x = x + pos.to(x.dtype)  # under autocast residual sums are 16-bit, as in VideoMAE
        return self.norm(self.blocks(x))


class Decoder(nn.Module):
    """Tokens (B,N,Dd) with positions, the num_masked masked ones last -> masked cubes (B,Nm,P)."""

    def __init__(self, c):  # c: Config
        super().__init__()
        sizes = c.decoder_embed_dim, c.decoder_num_heads, c.mlp_ratio, c.layer_norm_eps
        self.blocks = nn.Sequential(*[Block(*sizes) for _ in range(c.decoder_depth)])
        self.norm = nn.LayerNorm(c.decoder_embed_dim, eps=c.layer_norm_eps)
        self.head = nn.Linear(c.decoder_embed_dim, c.patch_dim)

    def forward(self, x, num_masked):
        x = self.blocks(x)[:, -num_masked:]  # (B,Nm,Dd)
        return self.head(self.norm(x))  # (B,Nm,P)


# ==== Losses: MSE of the masked cubes (3.1), InfoNCE over all ranks (3.4) =========================
def reconstruction_target(video, mask, config):
    """video (B,3,T,H,W) of normalize, mask (B,N) -> target (B,Nm,P), and mean, std (B,Nm,1,3). The
    pixels of a cube, in [0,1], are normalised per channel (unbiased variance, std + 1e-6), as in
    VideoMAE's engine_for_pretraining.py. target.unflatten(-1, (-1, 3)) * std + mean inverts it."""
    _, ids_mask = split_mask(mask, video.device)
    cubes = patchify(denormalize(video), config.patch_size, config.tubelet_size)  # (B,N,P)
    pixels = take(cubes, ids_mask).unflatten(-1, (-1, 3))  # (B,Nm,P/3,3)
    var, mean = torch.var_mean(pixels, dim=2, keepdim=True)  # (B,Nm,1,3)
    std = var.sqrt() + 1e-6
    return ((pixels - mean) / std).flatten(2), mean, std  # target (B,Nm,P)


def reconstruction_loss(pred, video, mask, config):
    """pred (B,Nm,P), in ascending order of cube; video (B,3,T,H,W) of normalize; mask (B,N), True =
    masked -> scalar, of the video's dtype: mean squared error of the masked cubes (3.1)."""
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
        # All ranks compute the whole loss: summed over them, the gradient of this rank's rows is
        # `world` times as large. DDP's mean over ranks divides by `world` again.
        grad = grad.clone(memory_format=torch.contiguous_format)  # autograd may share this tensor
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]  # (B,...)


def gather(x):
    """x (B,...) on each rank, B the same on all -> (world*B,...): all ranks' rows, in order. Its
    gradient is right once DDP has averaged (see _Gather). On a single process: x itself."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _Gather.apply(x)
    return x


def info_nce(video_emb, text_emb, temperature, *, groups=None):
    """InfoNCE, (4): -log(exp(q.k+/tau) / sum over all k of exp(q.k/tau)), the mean of videos as q,
    texts as k, and the reverse. video_emb, text_emb (B,E): a pair per row, normalised here, not
    gathered. groups (B,) ints or None: rows of one group (a video) are not negatives -> scalar."""
    with torch.autocast(video_emb.device.type, enabled=False):
        dtype = torch.promote_types(video_emb.dtype, torch.float32)
        video_emb = F.normalize(video_emb.to(dtype), dim=-1)
        text_emb = F.normalize(text_emb.to(dtype), dim=-1)
        logits = video_emb @ text_emb.T / temperature  # (B,B) cosine similarities / temperature
        if groups is not None:
            same = (groups[:, None] == groups[None, :]).fill_diagonal_(False)
            logits = logits.masked_fill(same, float("-inf"))
        target = torch.arange(len(logits), device=logits.device)  # the pairs are on the diagonal
        both = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)  # (4), both ways
    return both / 2


class ContrastiveHead(nn.Sequential):
    """The prediction head of 3.4, with "global batch norm" (its layers: ours, after SimCLR's), and
    InfoNCE over all ranks. head(pooled): (B,D) -> (B,E), what is compared with text. TGMAE gives
    its weights Xavier initialisation; by itself they have torch's."""

    def __init__(self, embed_dim, text_dim, temperature=0.07):
        hidden, out = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, text_dim)
        super().__init__(hidden, nn.BatchNorm1d(embed_dim), nn.ReLU(inplace=True), out)
        self.temperature = temperature

    def loss(self, pooled, text, groups=None):
        """pooled (B,D), text (B,E), groups (B,) or None, of this rank -> InfoNCE of the whole batch
        (world*B > 1 clips), the same scalar on every rank. All ranks must call it, with the same B,
        in the forward of the model that DDP wraps."""
        # Gathered before the head: its BatchNorm sees all ranks, and SyncBatchNorm is not needed.
        video_emb = self(gather(pooled))  # (world*B,E)
        groups = None if groups is None else gather(groups)
        return info_nce(video_emb, gather(text), self.temperature, groups=groups)


# ==== Model: video (B,3,T,H,W), mask (B,N), text (B,E) -> the two losses of 3.5 (Figure 2) ========
class TGMAE(nn.Module):
    """Video MAE with an optional video-text contrastive loss. Under DDP freeze what gets no
    gradient: without text the predictor; with mae=False decoder, encoder_to_decoder, mask_token
    (and, if watch is set, the encoder). torch.export takes `model.encoder`, (cubes, ids_keep)."""

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
        for linear in [module for module in self.modules() if isinstance(module, nn.Linear)]:
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def encode(self, video, mask=None):
        """video (B,3,T,H,W) of normalize, mask (B,N) or None -> (B,Nv,D), or (B,N,D), normed."""
        c = self.config
        shape = (len(video), 3, c.num_frames, c.image_size, c.image_size)
        assert video.shape == shape, f"video {tuple(video.shape)}: the model takes {shape}"
        cubes = patchify(video, c.patch_size, c.tubelet_size)  # (B,N,P)
        if mask is None:
            return self.encoder(cubes)
        assert mask.shape == cubes.shape[:2], f"mask {tuple(mask.shape)}: cubes {cubes.shape[:2]}"
        return self.encoder(cubes, split_mask(mask, video.device)[0])

    def decode(self, latent, mask):
        """latent (B,Nv,D) of the visible cubes, mask (B,N) -> predicted masked cubes (B,Nm,P)."""
        ids_keep, ids_mask = split_mask(mask, latent.device)
        visible = self.encoder_to_decoder(latent)  # (B,Nv,Dd)
        visible = visible + self.pos_embed[ids_keep].to(visible.dtype)  # (B,Nv,Dd)
        masked = self.mask_token + self.pos_embed[ids_mask]  # (B,Nm,Dd)
        x = torch.cat([visible, masked.to(visible.dtype)], dim=1)  # (B,N,Dd), visible first
        return self.decoder(x, ids_mask.shape[1])

    def forward(self, video, mask, text=None, *, mae=True, watch=False, groups=None):
        """video (B,3,T,H,W) of normalize; mask (B,N), True = masked, on the CPU (see split_mask);
        text (B,E) or None -> dict: `pred` (B,Nm,P) and the scalar `mae`, unless mae=False (no
        decoder runs); with text the scalar `vt`, of more than one clip. The caller adds them (3.5).
        watch: `vt` trains the predictor, not the encoder (our reading of Figure 4). groups: see
        info_nce."""
        latent = self.encode(video, mask)  # (B,Nv,D): the encoder of (3)
        out = {}
        if mae:
            out["pred"] = self.decode(latent, mask)  # (B,Nm,P): the decoder of (3)
            out["mae"] = reconstruction_loss(out["pred"], video, mask, self.config)
        if text is not None:
            pooled = latent.mean(dim=1)  # (B,D): of the visible cubes, 3.4's "all patches"
            out["vt"] = self.predictor.loss(pooled.detach() if watch else pooled, text, groups)
        return out
