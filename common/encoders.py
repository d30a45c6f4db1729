"""The frozen encoders of a Stable Diffusion 3 folder: pictures <-> latents, captions -> text states.

SnapGen keeps SD3's autoencoder ("the same encoder from SD3 AE", Sec. 3.2) and conditions the UNet on the token states of
frozen text encoders. Both come from one folder in diffusers' layout, so `assets/toy-sd3` (the class scale, committed here)
and a download of stable-diffusion-3.5-large are read by the same lines:

    vae/  text_encoder/  text_encoder_2/  tokenizer/  tokenizer_2/     (and transformer/, scheduler/: the teacher)

The paper's text-to-image model reads the caption with a language model besides, Gemma-2-2b [R]: --gemma names its folder.
"""

import functools
import hashlib
import json
import warnings
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import transformers
from diffusers import AutoencoderKL
from tqdm import tqdm
from transformers import AutoTokenizer, CLIPTextModelWithProjection, CLIPTokenizer, Gemma2Model, T5EncoderModel

from common import parallel
from common.checkpoint import save_atomically
from common.device import half
from common.texts import check_text

transformers.utils.logging.disable_progress_bar()  # one bar per network says nothing
PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
GEMMA_TOKENS = 128  # [A]
T5_TOKENS = 256  # diffusers' max_sequence_length


def hash_folders(folders):
    """A hash of the name and of every byte of every file in these folders (or of these files): other weights, another."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in map(Path, folders) for p in (folder, *folder.rglob("*")) if p.is_file()):
        digest.update(f"{path.relative_to(path.parents[1])} {hash_file(path)}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def hash_file(path, large=1 << 26):
    """SHA-256 of a file's bytes, as hex. Of a large one it is remembered in runs/cache/hashes, by path, size and times of
    change: to read SD3.5's 26 GB takes minutes."""
    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}".encode("utf-8", "surrogateescape")
    note = Path("runs/cache/hashes") / hashlib.sha256(key).hexdigest()
    if stat.st_size >= large and note.is_file() and len(note.read_text(encoding="utf-8-sig")) == 64:
        return note.read_text(encoding="utf-8-sig")
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(total=stat.st_size, unit="B", unit_scale=True, desc=f"reading {path.name}",
                                        disable=True if stat.st_size < large else None) as bar:  # fmt: skip
        while block := file.read(1 << 22):
            digest.update(block)
            bar.update(len(block))
    if stat.st_size >= large:
        save_atomically(lambda p: p.write_text(digest.hexdigest()), note)
    return digest.hexdigest()


class FrozenAutoencoder:
    """The autoencoder of an SD3 folder (or a folder that is one), in eval mode and without gradients.

    Args:
        folder: an SD3 folder in diffusers' layout, or its vae/ alone.
        device: where to run.
        dtype: precision of the network; latents and pictures come back in float32.

    Raises:
        SystemExit: with one sentence, when there is no autoencoder or it cannot be read.
    """

    parts = ("vae",)

    def __init__(self, folder="assets/toy-sd3", device="cpu", dtype=torch.float32):
        self.folder, self.device, self.dtype = Path(folder), torch.device(device), dtype
        self.vae_folder = self.folder / "vae" if (self.folder / "vae").is_dir() else self.folder
        if not (self.vae_folder / "config.json").is_file():
            raise SystemExit(
                f"{folder} holds no autoencoder: give assets/toy-sd3, a folder of stable-diffusion-3.5-large in "
                "diffusers' layout, or its vae/."
            )
        try:
            self.vae = AutoencoderKL.from_pretrained(self.vae_folder, dtype=dtype)
        except Exception as error:  # each library has its own for a damaged file
            raise SystemExit(f"cannot read the autoencoder in {self.vae_folder}: {error}") from error
        self.vae.requires_grad_(False).eval().to(device)
        self.shift_factor = self.vae.config.shift_factor or 0.0  # SDXL's has none
        self.scaling_factor = self.vae.config.scaling_factor
        self.latent_channels = self.vae.config.latent_channels
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)  # f = 8: pixels per latent cell and side

    def fingerprint(self, *parts):
        """hash_folders() of these parts (none given: of all parts)."""
        return hash_folders([self.vae_folder if part == "vae" else self.folder / part for part in parts or self.parts])

    @torch.no_grad()
    def encode_pictures(self, pictures):
        """(B, 3, H, W) in [-1, 1] -> model latents (B, 16, H/8, W/8).

        They are (z - shift_factor) * scaling_factor, with z the mean of the posterior.
        """
        z = self.vae.encode(pictures.to(self.device, self.dtype)).latent_dist.mode()
        return (z.float() - self.shift_factor) * self.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents):
        """Model latents (B, 16, h, w) -> pictures (B, 3, 8h, 8w) in [-1, 1]."""
        z = latents.to(self.device).float() / self.scaling_factor + self.shift_factor
        return self.vae.decode(z.to(self.dtype)).sample.float().clamp(-1, 1)


class FrozenEncoders(FrozenAutoencoder):
    """Autoencoder and CLIP text encoders of an SD3 folder, in eval mode and without gradients.

    Args:
        folder: an SD3 folder in diffusers' layout.
        device: where to run.
        dtype: precision of the networks; latents and states come back in float32.
        gemma: folder of Gemma-2-2b, or None.

    Raises:
        SystemExit: with one sentence, when the folder or one of its parts is missing or cannot be read.
    """

    parts = PARTS

    def __init__(self, folder="assets/toy-sd3", device="cpu", dtype=torch.float32, gemma=None):
        folder = Path(folder)
        missing = [part for part in PARTS if not (folder / part).is_dir()]
        if missing:
            raise SystemExit(
                f"{folder} is not a Stable Diffusion 3 folder: it lacks {', '.join(missing)}. "
                "Give --teacher assets/toy-sd3 or a folder of stable-diffusion-3.5-large in diffusers' layout."
            )
        super().__init__(folder, device, dtype)
        try:
            self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
            self.text_encoders = [
                CLIPTextModelWithProjection.from_pretrained(folder / name, dtype=dtype)
                for name in ("text_encoder", "text_encoder_2")
            ]
        except Exception as error:
            raise SystemExit(f"cannot read the text encoders in {folder}: {error}") from error
        for network in self.text_encoders:
            network.requires_grad_(False).eval().to(device)
        self.max_tokens = self.tokenizers[0].model_max_length
        self.text_dim = sum(encoder.config.hidden_size for encoder in self.text_encoders)
        self.first_clip = self.text_encoders[0].config.hidden_size
        self.gemma = Gemma(gemma, device, dtype) if gemma else None

    @classmethod
    def of(cls, config, device, folder=None):
        """Those of a student's config.json, or of `folder`; at the real sizes in half precision on a GPU, as in training."""
        dtype = torch.float32 if config.get("size") == "tiny" else half(device)
        return cls(folder or config["encoders"], device, dtype, config.get("gemma"))

    def fingerprint(self, *parts):
        """hash_folders() of these parts; none given: of all parts, and Gemma's hash behind."""
        return super().fingerprint(*parts) + (f"-{self.gemma.fingerprint()}" if self.gemma and not parts else "")

    @torch.no_grad()
    def encode_text(self, captions):
        """Captions -> what SD3 feeds its transformer.

        Returns:
            states: (B, T, D) penultimate hidden states of both CLIPs, channels concatenated (SD3.5: T = 77, D = 2048).
            mask: (B, T) bool, True up to and including the end-of-text token; the rest is padding.
            pooled: (B, P) both projected end-of-text states, concatenated.

        Over-long captions are cut to T tokens with a warning. Raises SystemExit for what is no text: see check_text.
        """
        check_text(captions)
        states, pooled, mask = [], [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            tokens = tokenizer(
                list(captions), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
            )
            if mask is None:
                mask = tokens.attention_mask.bool()
                full = [caption for caption, all_real in zip(captions, mask.all(1), strict=True) if all_real]
                cut = [caption for caption in full if len(tokenizer(caption).input_ids) > self.max_tokens]
                if cut:
                    warnings.warn(
                        f"{len(cut)} captions cut to {self.max_tokens} tokens, such as {cut[0][:60]!r}", stacklevel=2
                    )
            out = encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2].float())
            pooled.append(out.text_embeds.float())
        return torch.cat(states, dim=-1), mask.to(self.device), torch.cat(pooled, dim=-1)

    def encode_captions(self, captions, batch=64):
        """encode_text of many captions, `batch` at a time: float16 on the CPU, to be kept."""
        some = (self.encode_text(captions[start : start + batch]) for start in range(0, len(captions), batch))
        parts = [(states.half().cpu(), mask.cpu(), pooled.half().cpu()) for states, mask, pooled in some]
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def student_text(self, captions, width):
        """(states (B, T, width), mask (B, T)) as the student takes them: see pad_text."""
        states, mask, _ = self.encode_text(captions)
        if self.gemma is not None:
            gemma, gemma_mask = self.gemma.encode(captions)
            states, mask = join_text([(states, mask), (gemma.to(self.device).float(), gemma_mask.to(self.device))])
        return pad_text(states, width, self.first_clip), mask


class Gemma:
    """A Gemma-2 folder as a text encoder: the last hidden states of the caption's tokens.

    Args: folder, device, dtype as for FrozenEncoders. Raises SystemExit with one sentence when it cannot be read.
    """

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        self.folder, self.device = Path(folder), torch.device(device)
        if not (self.folder / "config.json").is_file():
            raise SystemExit(
                f"{folder} is no Gemma folder: give --gemma a download of google/gemma-2-2b, or leave it out."
            )
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            self.net = Gemma2Model.from_pretrained(folder, dtype=dtype)
        except Exception as error:
            raise SystemExit(f"cannot read Gemma in {folder}: {error}") from error
        self.net.requires_grad_(False).eval().to(device)
        self.tokenizer.padding_side = "right"

    def fingerprint(self):
        return hash_folders([self.folder])

    @torch.no_grad()
    def encode(self, captions, batch=64):
        """Captions -> (states (B, 128, D) float16 (Gemma-2-2b: D = 2304), mask (B, 128) bool, True for real tokens), on the CPU.

        The first token is always Gemma's <bos>, so an empty caption has one token. Over-long captions are cut.
        """
        states, masks = zip(*self.batches(captions, batch), strict=True)
        return torch.cat(states), torch.cat(masks)

    @torch.no_grad()
    def batches(self, captions, batch=64):
        """encode(), a batch at a time: of many captions the padding alone can fill the memory."""
        for start in range(0, len(captions), batch):
            tokens = self.tokenizer(list(captions[start : start + batch]), padding="max_length", max_length=GEMMA_TOKENS,
                                    truncation=True, return_tensors="pt").to(self.device)  # fmt: skip
            out = self.net(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
            yield out.half().cpu(), tokens.attention_mask.bool().cpu()


class T5:
    """The T5 of an SD3 folder as a text encoder, or one that says nothing: no folder text_encoder_3, or zeros for any caption.

    The student never reads it, the teacher does. In SD3.5 it has 4.7 B parameters.
    """

    def __init__(self, folder, device="cpu", dtype=torch.float32):
        self.device, self.silent = device, not (folder / "text_encoder_3").is_dir()
        if not self.silent:
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer_3")
                self.encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_3", dtype=dtype).to(device).eval()
            except Exception as error:  # each library has its own for a damaged file
                raise SystemExit(f"cannot read T5 (text_encoder_3, tokenizer_3) in {folder}: {error}") from error
            self.silent = not self(["a photo"]).any()

    @torch.no_grad()
    def __call__(self, captions):
        """Captions -> (B, 256, D) float16 on the CPU, padding included: SD3's transformer attends to it, and it is no constant,
        since T5 here attends to padding, too. So there is no storing the real tokens alone."""
        ids = self.tokenizer(
            list(captions), padding="max_length", max_length=T5_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return self.encoder(ids.to(self.device))[0].half().cpu()


class StoredT5:
    """T5's states of all captions of a data set: computed once, kept on the disk, read by rows. Then T5 need not stay in memory.

    A caption takes 2.1 MB with SD3.5's T5 (256 x 4096 in half precision), ten thousand 21 GB. So they are written as they come,
    `part` captions a file, cache/t5-HASH/00000.safetensors and so on, and the files are mapped: rows are read from the disk when
    they are asked for, and the system forgets them when others need the memory. A file that is there is not made again. A silent
    T5 has one file, an empty one.

    Args: folder, of SD3; captions, all that will be asked for; device, dtype, where and how T5 runs; cache, a folder.
    """

    def __init__(self, folder, captions, device, dtype, cache, part=64):
        key = json.dumps([captions, hash_folders([folder / "text_encoder_3"]), part])
        self.folder, self.part = Path(cache) / f"t5-{hashlib.sha256(key.encode()).hexdigest()[:16]}", part
        self.open = functools.cache(self._open)
        with parallel.first_alone():
            self._encode(folder, captions, device, dtype)
        self.silent = self.open(0).get_shape()[0] == 0

    def path(self, k):
        return self.folder / f"{k:05d}.safetensors"

    def _encode(self, folder, captions, device, dtype):
        """Write what is missing."""
        if self.path(0).is_file() and self.open(0).get_shape()[0] == 0:
            return
        starts = [start for start in range(0, len(captions), self.part) if not self.path(start // self.part).is_file()]
        t5 = T5(folder, device, dtype) if starts else None
        if t5 and t5.silent:
            save_atomically(functools.partial(safetensors.torch.save_file, {"t5": torch.zeros(0)}), self.path(0))
            return
        for start in tqdm(starts, desc=f"T5 into {self.folder}", unit=f" times {self.part} captions", mininterval=1, disable=None):
            states = t5(captions[start : start + self.part])
            save_atomically(functools.partial(safetensors.torch.save_file, {"t5": states}), self.path(start // self.part))

    def _open(self, k):
        try:
            return safetensors.safe_open(self.path(k), "pt").get_slice("t5")
        except (OSError, safetensors.SafetensorError) as error:
            raise SystemExit(f"{self.path(k)} is damaged ({error}): delete it and start again, which makes it alone.") from error

    def __call__(self, ids):
        """Numbers of captions (B,) -> (B, 256, D) float16."""
        return torch.stack([self.open(i // self.part)[i % self.part] for i in ids.tolist()])


def join_text(parts):
    """[(states (B, T, D), mask (B, T)), ...] of several encoders -> one such pair: tokens one after the other, the order that
    of the list (CLIP, then Gemma) [R, A], narrow states padded with zeros to the widest."""
    width = max(states.shape[-1] for states, _ in parts)
    return torch.cat([pad_text(states, width) for states, _ in parts], 1), torch.cat([mask for _, mask in parts], 1)


def pad_text(states, width, first_clip=None):
    """(B, T, D) -> (B, T, width), so that one UNet takes encoders of several widths: zeros behind narrower states.

    SD3.5's two CLIPs give D = 2048; the text-to-image preset takes 2304, the width of Gemma-2-2b (our assumption). A UNet too
    narrow for both CLIPs takes the first one's `first_clip` channels alone: CLIP-L, as the paper's ImageNet model does.
    Raises SystemExit when even these are wider.
    """
    if first_clip is not None and first_clip <= width < states.shape[-1]:
        states = states[..., :first_clip]
    if states.shape[-1] > width:
        raise SystemExit(
            f"the text states are {states.shape[-1]} wide, this UNet takes {width}: give the --teacher whose encoders it "
            "was made for, or a larger --size."
        )
    missing = width - states.shape[-1]
    return torch.nn.functional.pad(states, (0, missing)) if missing else states  # a batch of real states is hundreds of megabytes
