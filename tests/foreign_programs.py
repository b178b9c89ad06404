"""Other programs' models, small and in their own code's shapes, and the files that those programs write of them.

`python3 tests/foreign_programs.py` writes the golden files of tests/fixtures/foreign/ anew; they are asserted by
values, because torch's archives differ from version to version.
"""

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

GOLDEN = Path(__file__).resolve().parent / "fixtures" / "foreign"
SIZES = {"vocab_size": 11, "block_size": 6, "n_layer": 2, "n_head": 3, "n_embd": 12}
SMALL = {"vocab_size": 5, "block_size": 4, "n_layer": 1, "n_head": 2, "n_embd": 4}  # of the golden files
CHARS = list("\n abc")


# nanoGPT's model.py (https://github.com/karpathy/nanoGPT/blob/master/model.py), its names, order and sums.


class NanoLayerNorm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int, bias: bool) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.n_head, self.n_embd = n_head, n_embd
        # The mask that nanoGPT registers where torch has no flash attention; its name is that of a bias.
        self.register_buffer("mask", torch.tril(torch.ones(block_size, block_size)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
            for part in self.c_attn(x).split(self.n_embd, dim=2)
        )
        att = (q @ k.transpose(-2, -1)) * (1.0 / k.size(-1) ** 0.5)
        att = F.softmax(att.masked_fill(self.mask[:T, :T] == 0, float("-inf")), dim=-1)
        return self.c_proj((att @ v).transpose(1, 2).contiguous().view(B, T, C))


class NanoMLP(nn.Module):
    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))


class NanoBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int, bias: bool) -> None:
        super().__init__()
        self.ln_1 = NanoLayerNorm(n_embd, bias)
        self.attn = NanoAttention(n_embd, n_head, block_size, bias)
        self.ln_2 = NanoLayerNorm(n_embd, bias)
        self.mlp = NanoMLP(n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(
        self, *, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int, bias: bool = True
    ) -> None:
        super().__init__()
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(block_size, n_embd),
            "h": nn.ModuleList(NanoBlock(n_embd, n_head, block_size, bias) for _ in range(n_layer)),
            "ln_f": NanoLayerNorm(n_embd, bias),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer.wte(ids) + self.transformer.wpe(torch.arange(ids.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))

    def configure_optimizers(self) -> torch.optim.AdamW:
        """Two groups: parameters with two dimensions or more are decayed."""
        parameters = [parameter for _, parameter in self.named_parameters() if parameter.requires_grad]
        groups = [
            {"params": [one for one in parameters if one.dim() >= 2], "weight_decay": 1e-1},
            {"params": [one for one in parameters if one.dim() < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))


# The lecture's gpt.py (https://github.com/karpathy/ng-video-lecture/blob/master/gpt.py), as programs built on it store it.


class LectureHead(nn.Module):
    tril: Tensor

    def __init__(self, n_embd: int, head_size: int, block_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.register_buffer("tril", torch.tril(torch.ones(block_size, block_size)))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)


class LectureAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(LectureHead(n_embd, n_embd // n_head, block_size) for _ in range(n_head))
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class LectureFeedForward(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.ReLU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LectureBlock(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        self.sa = LectureAttention(n_embd, n_head, block_size)
        self.ffwd = LectureFeedForward(n_embd)
        self.ln1, self.ln2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class LectureModel(nn.Module):
    def __init__(self, *, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, n_embd)
        self.position_embedding_table = nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(LectureBlock(n_embd, n_head, block_size) for _ in range(n_layer)))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embedding_table(torch.arange(ids.shape[1]))
        return self.lm_head(self.ln_f(self.blocks(self.token_embedding_table(ids) + positions)))


# What the programs keep.


def shaken(module: Any) -> Any:
    """The module with every number moved, so that an error in any tensor shows in the logits."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module.eval()


def meta(chars: list[str]) -> bytes:
    """meta.pkl as nanoGPT's data/*/prepare.py writes it."""
    itos, stoi = dict(enumerate(chars)), {char: index for index, char in enumerate(chars)}
    return pickle.dumps({"vocab_size": len(chars), "itos": itos, "stoi": stoi})


def nanogpt(
    model: NanoGPT, optimizer: torch.optim.Optimizer | None = None, *, prefix: str = "", step: int = 250
) -> dict[str, Any]:
    """The dict that nanoGPT's train.py gives torch.save."""
    sizes = dict(zip(("vocab_size", "n_embd"), model.lm_head.weight.shape, strict=True))
    block = model.transformer.h[0]
    sizes |= {
        "block_size": model.transformer.wpe.num_embeddings,
        "n_layer": len(model.transformer.h),
        "n_head": block.attn.n_head,
    }
    return {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": (optimizer or model.configure_optimizers()).state_dict(),
        "model_args": sizes | {"bias": block.ln_1.bias is not None, "dropout": 0.0},
        "iter_num": step,
        "best_val_loss": torch.tensor(1.75),
        "config": {"out_dir": "out", "n_layer": 12, "learning_rate": 6e-4, "compile": True, "dtype": "bfloat16"},
    }


def lightning(model: nn.Module, hyper_parameters: dict[str, Any], *, step: int = 20) -> dict[str, Any]:
    """The dict that Lightning 2's ModelCheckpoint saves of a LightningModule whose network is `self.model`."""
    progress = {"total": {"ready": 1, "completed": 1}, "current": {"ready": 1, "completed": 1}}
    score = {"monitor": "val_loss", "best_model_score": torch.tensor(1.5), "best_model_path": "epoch=1-step=20.ckpt"}
    return {
        "epoch": 1,
        "global_step": step,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{name}": tensor for name, tensor in model.state_dict().items()},
        "loops": {
            "fit_loop": {
                "state_dict": {},
                "epoch_progress": progress,
                "epoch_loop.batch_progress": {**progress, "is_last_batch": True},
            }
        },
        "callbacks": {"ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min'}": score},
        "optimizer_states": [torch.optim.AdamW(model.parameters()).state_dict()],
        "lr_schedulers": [{"last_epoch": 1, "_last_lr": [1e-3]}],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }


def pair(
    model: nn.Module, config: dict[str, Any], optimizer: dict[str, Any] | None = None, *, step: int = 1000
) -> tuple[dict, dict]:
    """Return a model file and its optimizer file."""
    ours = {"model_state_dict": dict(model.state_dict()), "global_step": step, "config": config}
    rest = {
        "optimizer_states": [optimizer or {"state": {}, "param_groups": []}],
        "lr_scheduler_states": [{"last_epoch": step}],
    }
    return ours, {**rest, "global_step": step, "epoch": 5}


def write_pair(folder: Path, halves: tuple[dict, dict], stem: str = "checkpoint-step001000") -> Path:
    """Write both as files; return the path of the model file."""
    for half, content in zip(("model", "optimizer"), halves, strict=True):
        torch.save(content, folder / f"{stem}-{half}.pt")
    return folder / f"{stem}-model.pt"


def write_lecture_folder(
    path: Path, model: LectureModel, tokenizer: dict[str, Any], *, step: int = 1000, **config: Any
) -> Path:
    """The five files of the directory layout as another program has them: no manifest."""
    path.mkdir(parents=True)
    torch.save(model.state_dict(), path / "model.pt")
    torch.save(torch.optim.AdamW(model.parameters()).state_dict(), path / "optimizer.pt")
    sizes = {"vocab_size": model.lm_head.out_features, "block_size": model.position_embedding_table.num_embeddings}
    sizes |= {
        "n_embd": model.lm_head.in_features,
        "n_layer": len(model.blocks),
        "n_head": len(model.blocks[0].sa.heads),
    }
    (path / "config.json").write_text(
        json.dumps({"batch_size": 32, **sizes, "dropout": 0.2, "bias": False, "device": "cuda"} | config)
    )
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "training_state.json").write_text(json.dumps({"step": step, "optimizer_file": "optimizer.pt"}))
    return path


def write_step(folder: Path, state: dict[str, Tensor], *, step: int = 100, **metrics: float) -> Path:
    """`step_000100.safetensors` and its state JSON, as MLX programs have them; returns the weights' path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step_{step:06d}.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    (folder / f"step_{step:06d}_state.json").write_text(json.dumps({"step": step, "epoch": 5, "metrics": metrics}))
    return path


def write_consolidated(path: Path, state: dict[str, Tensor], config: dict[str, Any]) -> Path:
    """`checkpoint_001000/consolidated/` with the two files to share and no training state."""
    (path / "consolidated").mkdir(parents=True)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()},
        path / "consolidated" / "consolidated.safetensors",
    )
    (path / "consolidated" / "config.json").write_text(json.dumps(config))
    return path


def bare(model: NanoGPT) -> dict[str, Tensor]:
    """Flat names without nanoGPT's prefix and without the twin of the embedding, as our own are."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


# The golden files.


def filled(module: Any) -> Any:
    """Return the module with values that follow from their positions; exact in every format."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            flat = (torch.arange(parameter.numel()) * 7 + number) % 61 - 30
            parameter.copy_(flat.reshape(parameter.shape) / 32)
    return module.eval()


def golden_nano() -> NanoGPT:
    """The GPT of the golden files."""
    return filled(NanoGPT(**SMALL, bias=False))


def golden_lecture() -> LectureModel:
    """The lecture model of the golden files."""
    return filled(LectureModel(**SMALL))


def golden_moments() -> torch.optim.AdamW:
    """nanoGPT's optimizer of the golden GPT, its moments filled by their places."""
    optimizer = golden_nano().configure_optimizers()
    for number, parameter in enumerate(one for group in optimizer.param_groups for one in group["params"]):
        optimizer.state[parameter] = {
            "step": torch.tensor(250.0),
            "exp_avg": torch.full_like(parameter, number / 64),
            "exp_avg_sq": torch.full_like(parameter, number / 128),
        }
    return optimizer


def make(folder: Path) -> None:
    """Writes each program's golden files below `folder`."""
    nano, lecture, config = golden_nano(), golden_lecture(), SMALL | {"activation": "gelu_erf", "bias": False}
    for name in ("nanogpt", "lightning", "lecture", "unified", "pair", "mlx"):
        (folder / name).mkdir(parents=True)
    for name in ("nanogpt", "lightning", "unified", "pair"):
        (folder / name / "meta.pkl").write_bytes(meta(CHARS))
    torch.save(nanogpt(nano, golden_moments(), prefix="_orig_mod."), folder / "nanogpt" / "ckpt.pt")
    torch.save(lightning(nano, SMALL | {"lr": 1e-3}), folder / "lightning" / "epoch=1-step=20.ckpt")
    torch.save({"model_state_dict": lecture.state_dict(), "step": 30}, folder / "lecture" / "latest.pt")
    chars = {"token_kind": "char", "chars": CHARS}
    (folder / "lecture" / "tokenizer.json").write_text(json.dumps(chars))
    write_lecture_folder(folder / "directory" / "dante", lecture, chars)
    rest = {"optimizer": None, "lr_scheduler": None, "global_step": 1000, "epoch": 5, "config": config}
    torch.save({"model": bare(nano), **rest}, folder / "unified" / "checkpoint-step001000.pt")
    write_pair(folder / "pair", pair(nano, config))
    write_step(folder / "mlx", bare(nano), val_loss=2.5)
    (folder / "mlx" / "config.json").write_text(json.dumps(config))
    (folder / "mlx" / "tokenizer.json").write_text(json.dumps(chars))
    place = write_consolidated(folder / "consolidated" / "checkpoint_001000", bare(nano), config)
    (place / "consolidated" / "tokenizer.json").write_text(json.dumps(chars))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
