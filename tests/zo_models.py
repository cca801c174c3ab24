"""Small random models, a byte tokenizer and reproducible signs for the tests of `peerturb.zo`."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BloomConfig,
    DistilBertConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MPNetConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    T5Config,
    UMT5Config,
)

from peerturb.manifest import Manifest, Parameter
from peerturb.spec import ModelSpec, ObjectiveSpec, PerturbationSpec, RoundSpec, RunSpec
from peerturb.zo.directions import Directions, Probes
from peerturb.zo.model import build_manifest, prepare

VOCABULARY = 264
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA: dict[str, Any] = {**SIZES, "intermediate_size": 56, "num_key_value_heads": 2}
QWEN3_MOE: dict[str, Any] = {**LLAMA, "head_dim": 8}
NEOX: dict[str, Any] = {
    "intermediate_size": 56,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama-tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "llama-untied-biased": lambda: LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True),
    "mistral-window": lambda: MistralConfig(**LLAMA, sliding_window=4),
    "qwen2": lambda: Qwen2Config(**LLAMA),
    "qwen3": lambda: Qwen3Config(**LLAMA, head_dim=8),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    ),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=24),
    "opt-350m": lambda: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=24, do_layer_norm_before=False),
    "gemma2": lambda: Gemma2Config(**LLAMA, head_dim=8, query_pre_attn_scalar=8, sliding_window=4),
    "gemma3": lambda: Gemma3TextConfig(
        **LLAMA,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi3": lambda: Phi3Config(**LLAMA),
    "neox": lambda: GPTNeoXConfig(**SIZES, **NEOX),
    "neox-tied-serial": lambda: GPTNeoXConfig(
        **SIZES, intermediate_size=56, tie_word_embeddings=True, use_parallel_residual=False
    ),
    "mixtral": lambda: MixtralConfig(**LLAMA, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **QWEN3_MOE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=24, mlp_only_layers=[1]
    ),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **LLAMA,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "bloom": lambda: BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "gpt-oss": lambda: GptOssConfig(**LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
}
"""Causal language models."""

EAGER = ("bloom", "gemma2", "gpt-oss")
"""Models that know no other attention."""

EXCLUDE: dict[str, tuple[str, ...]] = {"gpt-oss": ("*.sinks",)}
"""What the engine refuses and an operator would freeze."""

BERT: dict[str, Any] = {**SIZES, "intermediate_size": 56}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 56,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5_UNTIED: dict[str, Any] = {**T5, "tie_word_embeddings": False}
CLASSIFIERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**BERT),
    "minilm": lambda: BertConfig(**BERT, type_vocab_size=2, hidden_act="gelu"),
    "roberta": lambda: RobertaConfig(**BERT),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=56, max_position_embeddings=64, pad_token_id=1
    ),
    "albert": lambda: AlbertConfig(**BERT, embedding_size=16),
    "mpnet": lambda: MPNetConfig(**BERT),
    "modernbert": lambda: ModernBertConfig(**BERT, cls_token_id=0, sep_token_id=1),
    "llama": lambda: LlamaConfig(**LLAMA),
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=1),
    "t5": lambda: T5Config(**T5),
    "bart": lambda: BartConfig(**BART),
}
SEQ2SEQ: dict[str, Callable[[], Any]] = {
    "t5": lambda: T5Config(**T5),
    "umt5": lambda: UMT5Config(**T5),
    "bart": lambda: BartConfig(**BART),
    "t5-gated-untied": lambda: T5Config(**T5_UNTIED, feed_forward_proj="gated-gelu"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: threads only wait for each other. Import it into a test module to switch it on there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(name: str, *, kind: str = "causal", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return a random model whose norms and biases are not at their trivial start.

    Args:
        kind: "causal", "classes" (three of them) or "seq2seq".
    """
    torch.manual_seed(seed)
    builder: Any
    if kind == "classes":
        config, builder = CLASSIFIERS[name](), AutoModelForSequenceClassification
        config.num_labels = 3
    elif kind == "seq2seq":
        config, builder = SEQ2SEQ[name](), AutoModelForSeq2SeqLM
    else:
        config, builder = CONFIGS[name](), AutoModelForCausalLM
        config._attn_implementation = "eager" if name in EAGER else "sdpa"
    model: Any = prepare(builder.from_config(config), "float32")
    model = model.to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0, 0.2)
        else:
            parameter.data.normal_(0.0, 0.15)
    return model


def byte_tokenizer(*, begins_with_bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, except that " a" and " b" are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1} | {letter: number + 2 for number, letter in enumerate(alphabet)}
    blank = "\u0120"
    vocabulary |= {blank + "a": 258, blank + "b": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(blank, "a"), (blank, "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if begins_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def manifest_of(model: Any, *, exclude: Sequence[str] = (), exponents: dict[str, int] | None = None) -> Manifest:
    """Return the manifest; float64 models count as float32 here."""
    wide = next(model.parameters()).dtype == torch.float64
    spec = ModelSpec(name="test", digest="0" * 64, exclude=tuple(exclude), exponents=exponents or {})
    if not wide:
        return build_manifest(model, spec)
    try:
        return build_manifest(model.float(), spec)
    finally:
        model.double()


def spec_of(
    *,
    family: str = "rank1",
    objective: dict[str, Any] | None = None,
    probes: int = 6,
    epsilon: float = 1e-3,
    sides: str = "two",
    digest: str = "0" * 64,
) -> RunSpec:
    """Return a RunSpec for a small model; `digest` where somebody compares it."""
    return RunSpec(
        name="test",
        model=ModelSpec(name="test", digest=digest),
        perturbation=PerturbationSpec.model_validate({"family": family, "epsilon": epsilon, "sides": sides}),
        round=RoundSpec(probes_max=probes),
        objective=ObjectiveSpec.model_validate({"tokens_max": 16, **(objective or {})}),
    )


def written_out(module: nn.Module, manifest: Manifest, spec: RunSpec, sample: int, step: float) -> Any:
    """Return a copy with the weights of one side of a probe: that of round 0, slot 0."""
    moved = copy.deepcopy(module)
    named = dict(moved.named_parameters(remove_duplicate=False))
    signs = Directions(Probes.of(run_key=spec.run_key, round=0, slots=0, samples=[sample]))
    for entry in manifest:
        z = signs.left(entry)[0].double()
        if entry.kind != "vector" and spec.perturbation.family == "dense":
            z = signs.dense(entry, 0).double()
        elif entry.kind != "vector":
            z = torch.outer(z, signs.right(entry)[0].double())
        tensor = named[entry.name]
        tensor.data.copy_(tensor.double() + step * z.view(tensor.shape))
    return moved


class RandomSigns:
    """Signs for a whole manifest from a torch seed (tests of one machine need no Philox)."""

    def __init__(self, manifest: Manifest, probes: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1

        self._left = {p.index: draw(probes, p.stacked[0] * p.stacked[1]) for p in manifest}
        self._right = {p.index: draw(probes, p.stacked[0] * p.stacked[2]) for p in manifest}
        self._dense = {p.index: draw(probes, p.stacked[0] * p.stacked[1], p.stacked[2]) for p in manifest}

    def left(self, parameter: Parameter) -> Tensor:
        return self._left[parameter.index]

    def right(self, parameter: Parameter) -> Tensor:
        return self._right[parameter.index]

    def dense(self, parameter: Parameter, probe: int) -> Tensor:
        return self._dense[parameter.index][probe]

    def noise(self, parameter: Parameter, probe: int, family: str) -> Tensor:
        """Return z of one tensor, written out."""
        if parameter.kind == "vector":
            return self._left[parameter.index][probe].view(parameter.shape)
        if family == "dense":
            return self._dense[parameter.index][probe].view(parameter.shape)
        matrices, rows, columns = parameter.stacked
        left = self._left[parameter.index][probe].view(matrices, rows, 1)
        right = self._right[parameter.index][probe].view(matrices, 1, columns)
        return (left * right).view(parameter.shape)
