"""The same model, loss and optimizer in PyTorch, written as in nanoGPT."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from tests.benchmarks.closed_loop import ClosedLoop
from tests.benchmarks.setup import Setup
from tests.benchmarks.side_by_side import cores
from tests.benchmarks.worker import resident_peak

Config = dict[str, Any]
Cache = list[tuple[torch.Tensor, torch.Tensor]]


class Block(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config["width"]
        self.heads = config["heads"]
        self.ln_1 = nn.LayerNorm(width)
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, config["hidden_width"])
        self.mlp_proj = nn.Linear(config["hidden_width"], width)
        self.dropout = nn.Dropout(config["dropout"])

    def forward(self, x: torch.Tensor, cache: Any = None, position: int | torch.Tensor = 0) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (a.view(B, T, self.heads, C // self.heads).transpose(1, 2) for a in (q, k, v))
        if cache is None:
            dropped = self.dropout.p if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropped)
        elif isinstance(position, torch.Tensor):
            # One token at a position (1,) that a graph reads from the device.
            keys, values = cache
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            read = (torch.arange(keys.shape[2], device=x.device) <= position)[None, None, None]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=read)
        else:
            keys, values = cache
            keys[:, :, position : position + T] = k
            values[:, :, position : position + T] = v
            end = position + T
            y = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], is_causal=T > 1)
        x = x + self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))
        return x + self.dropout(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")))


class GPT(nn.Module):
    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, config["width"])
        self.wpe = nn.Embedding(config["context_length"], config["width"])
        self.dropout = nn.Dropout(config["dropout"])
        self.blocks = nn.ModuleList(Block(config) for _ in range(config["layers"]))
        self.ln_f = nn.LayerNorm(config["width"])
        self.head = nn.Linear(config["width"], vocabulary, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("c_proj.weight", "mlp_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config["layers"]) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if config["tied_head"]:
            self.head.weight = self.wte.weight

    def forward(
        self, tokens: torch.Tensor, cache: Cache | None = None, position: int | torch.Tensor = 0
    ) -> torch.Tensor:
        if isinstance(position, torch.Tensor):
            positions = position
        else:
            positions = torch.arange(position, position + tokens.shape[1], device=tokens.device)
        x = self.dropout(self.wte(tokens) + self.wpe(positions))
        for number, block in enumerate(self.blocks):
            x = block(x, cache[number] if cache else None, position)
        return self.head(self.ln_f(x))  # type: ignore[no-any-return]

    def loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self(inputs).flatten(0, 1), targets.flatten())


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [one for one in parameters if one.ndim >= 2], "weight_decay": config["weight_decay"]},
        {"params": [one for one in parameters if one.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=config["learning_rate"], betas=(config["beta1"], config["beta2"]), eps=1e-8, fused=True
    )


class Training:
    """Trains eagerly or compiled, by `variant`. On a GPU it uses autocast to bf16 over fp32 weights, and pads the
    vocabulary to a multiple of 64."""

    def __init__(self, config: Config, rows: int, variant: str) -> None:
        torch.set_num_threads(cores())
        torch.manual_seed(1)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")
        vocabulary = config["vocabulary_size"]
        padded = -(-vocabulary // 64) * 64 if self._device == "cuda" else vocabulary
        self.model = GPT(config, padded).to(self._device)
        self._loss = torch.compile(self.model.loss) if variant == "compiled" else self.model.loss
        self._optimizer = make_optimizer(self.model, config)
        self._clip = config["max_gradient_norm"]
        shape = (rows, config["context_length"] + 1)
        tokens = torch.randint(vocabulary, shape, device=self._device)
        self._inputs, self._targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self) -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=self._device == "cuda"):
            loss = self._loss(self._inputs, self._targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else resident_peak()


class Decoding:
    """Decodes `rows` rows, from `position` tokens on; every step reads the tokens back.

    `variant` "" takes the likeliest tokens, in fp32 on the CPU. "graph" draws at temperature 0.8, in bf16 on an NVIDIA
    GPU, in one CUDA graph a step; its attention reads the whole cache, masked, as gpt-fast does.
    """

    def __init__(self, config: Config, rows: int, position: int, variant: str) -> None:
        torch.set_num_threads(cores())
        torch.manual_seed(1)
        self._graph = variant == "graph"
        device, dtype = ("cuda", torch.bfloat16) if self._graph else ("cpu", torch.float32)
        self._model = GPT(config, config["vocabulary_size"]).eval().to(device, dtype)
        shape = (rows, config["heads"], config["context_length"], config["width"] // config["heads"])  # (B, H, T, D)
        self._cache = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)) for _ in range(config["layers"])
        ]
        self._tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._start = self._position = position
        self._last = config["context_length"]
        if self._graph:
            self._place = torch.zeros(1, dtype=torch.long, device=device)
            self._record()

    @torch.inference_mode()
    def _record(self) -> None:
        # PyTorch needs some runs on another stream before it records.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(side)
        self._recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._recorded):
            self._compute()

    def _compute(self) -> None:
        self._draw(self._model(self._tokens, self._cache, self._place)[:, -1])

    def _draw(self, logits: torch.Tensor) -> None:
        """Takes the likeliest tokens, or draws: the largest probability after a division by exponential noise."""
        weights = logits
        if self._graph:
            weights = torch.softmax(logits.float() / 0.8, dim=-1)
            weights = weights / torch.empty_like(weights).exponential_(1)
        self._tokens.copy_(weights.argmax(dim=-1, keepdim=True))

    @torch.inference_mode()
    def read(self, prompts: list[list[int]]) -> None:
        """Reads a prompt of the same length for each row, and draws the first tokens."""
        tokens = torch.tensor(prompts, device=self._tokens.device)
        self._draw(self._model(tokens, self._cache, 0)[:, -1])
        self._tokens.tolist()
        self._position = tokens.shape[1]

    @torch.inference_mode()
    def step(self) -> None:
        if self._position == self._last:
            self._position = self._start
        if self._graph:
            self._place.fill_(self._position)
            self._recorded.replay()
        else:
            self._draw(self._model(self._tokens, self._cache, self._position)[:, -1])
        self._tokens.tolist()
        self._position += 1

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self._graph else resident_peak()


class Generation:
    """Generates for all rows at once with `Decoding`, which neither streams nor accepts new requests."""

    def __init__(self, setup: dict[str, Any], work: dict[str, Any], variant: str) -> None:
        given = Setup.from_dict(setup)
        self._work = ClosedLoop(**work)
        config = given.checkpoint.config.to_dict()
        self._decoding = Decoding(config, self._work.rows, self._work.prompt_tokens, variant)
        torch.set_num_threads(given.threads)
        self._prompts = self._work.prompts()

    def step(self) -> None:
        self._decoding.read(next(self._prompts))
        for _ in range(self._work.output_tokens - 1):
            self._decoding.step()

    def wait(self) -> None:
        pass

    def peak_bytes(self) -> int:
        return self._decoding.peak_bytes()
