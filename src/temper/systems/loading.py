"""A base system from its name: an asset, a tiny random model, a folder, a hub model or an endpoint."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from temper.core.errors import ConfigError, DataError, ModelError, NeedsError, nearest
from temper.systems.base import System
from temper.systems.causal_lm import CausalLM
from temper.systems.chat import Chat
from temper.systems.encoder import Encoder
from temper.systems.freed_memory import trim_heap
from temper.systems.memory import check_memory, header_count
from temper.systems.names import (
    FORMS,
    asset_names,
    check_base,
    check_folder,
    kind_of,
    kind_of_config,
    known_bases,
)
from temper.systems.row_attention import use_rows
from temper.systems.sentence_layout import Dense, Layout, attach_dense, read_layout
from temper.systems.tiny import build_tiny, build_tiny_encoder
from temper.systems.wanted import Wanted

__all__ = ["bars_as_due", "explained", "explained_errors", "known_bases", "load_base", "parse_dtype"]

logger = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


def load_base(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    attention: str = "sdpa",
    system_prompt: str = "default",
    base_url: str | None = None,
    chat_template: Path | str | None = None,
    plain: Literal["qa", "bare"] = "qa",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> System:
    """The system a name stands for; safetensors only, and no code from a model's repository by default.

    `attention="sdpa"` becomes eager where the architecture has no sdpa. `tiny:ARCH[:SEED]` is a random model. `chat_template` is a template file that replaces the
    tokenizer's; it, `system_prompt` and `plain` concern language models. Raises ConfigError for an unknown name,
    ModelError for a model of no known kind or without safetensors, NeedsError when memory, device or network are missing.
    """
    check_base(name)
    if name.startswith("openai:"):
        from temper.systems.remote import Remote

        return Remote(model=name.removeprefix("openai:"), base_url=base_url, system_prompt=system_prompt)
    wanted = Wanted(
        dtype=parse_dtype(dtype),
        device=_check_device(device),
        attention=attention,
        trust_remote_code=trust_remote_code,
        revision=revision,
    )
    kind = _kind(name, wanted)
    if kind != "CausalLM":
        return _load_other(kind, name, wanted)
    model, tokenizer = _load_tiny(name, wanted) if name.startswith("tiny:") else _load_named(name, wanted)
    if chat_template is None:
        chat = Chat(tokenizer, system_prompt, plain=plain)
    else:
        chat = Chat.from_file(tokenizer, chat_template, system_prompt, plain=plain)
    _check_sizes(model, tokenizer, name)
    _check_end_of_turn(chat)
    trim_heap()  # reading a tokenizer leaves some 30 MB behind
    return CausalLM(model, tokenizer, chat, wanted.device, spec=name)


def _kind(name: str, wanted: Wanted) -> str:
    """The kind of system a base is; a hub name is asked for its config, or for the index of a pipeline."""
    if ":" in name or name in asset_names() or Path(name).expanduser().is_dir():
        return kind_of(name)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, **wanted.common())
    except (OSError, ValueError, KeyError) as error:
        if "does not appear to have a file named config.json" in str(error) and _is_pipeline(name, wanted):
            return "Diffusion"
        raise explained(error, name) from error
    return kind_of_config(config.model_type, config.architectures)


def _is_pipeline(name: str, wanted: Wanted) -> bool:
    from huggingface_hub import file_exists
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return file_exists(name, "model_index.json", revision=wanted.revision)
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled):
        return False


def _load_other(kind: str, name: str, wanted: Wanted) -> System:
    """A system of a kind other than CausalLM; its module is imported here alone."""
    if kind == "Encoder":
        return _load_encoder(name, wanted)
    if kind == "ImageClassifier":
        from temper.systems.image_classifier import load_image_classifier

        return load_image_classifier(name, wanted)
    if kind == "DualEncoder":
        from temper.systems.dual_encoder import load_dual_encoder

        return load_dual_encoder(name, wanted)
    from temper.systems.diffusion import load_diffusion

    return load_diffusion(name, wanted)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name ("float32", "bf16", ...); raises ConfigError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"{dtype!r} is not a dtype", cure=nearest(dtype, DTYPES))
    return DTYPES[dtype]


def _encoder_source(name: str, wanted: Wanted) -> str:
    """The folder of an encoder, fetched if need be, or its tiny name."""
    if name in asset_names():
        from temper.data import assets

        return str(assets.fetch(name))
    folder = Path(name).expanduser()
    if name.startswith("tiny:") or folder.is_dir():
        return name if name.startswith("tiny:") else str(folder)
    from huggingface_hub import snapshot_download

    with explained_errors(name):
        kinds = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return snapshot_download(name, revision=wanted.revision, allow_patterns=kinds)


def _load_encoder(name: str, wanted: Wanted) -> Encoder:
    """An encoder with what its folder says of pooling; without such files it takes the mean and nothing else."""
    source = _encoder_source(name, wanted)
    if source.startswith("tiny:"):
        _, architecture, *rest = source.split(":")
        model, tokenizer = build_tiny_encoder(architecture, *(int(part) for part in rest))
        layout, dense = Layout(), list[Dense]()
    else:
        check_folder(Path(source), name)
        check_memory(_count_weights(None, Path(source), wanted), name, wanted)
        with bars_as_due(is_download=False), explained_errors(name):
            layout, dense = read_layout(Path(source))
            model, tokenizer = _read_encoder(source, name, wanted)
    if wanted.attention == "sdpa":
        use_rows(model)
    else:
        model.set_attn_implementation(wanted.attention)
    attach_dense(model, dense)
    model.to(device=wanted.device, dtype=wanted.dtype).eval()
    _check_sizes(model, tokenizer, name)
    return Encoder(model, tokenizer, layout, wanted.device, spec=name)


def _read_encoder(source: str, name: str, wanted: Wanted) -> tuple[Any, Any]:
    """Model and tokenizer; a pooler that the file does not hold is left out instead of drawn at random."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **wanted.common())
    model, found = AutoModel.from_pretrained(
        source, dtype=wanted.dtype, use_safetensors=True, output_loading_info=True, **wanted.common()
    )
    missing = {key for key in found["missing_keys"] if not key.startswith("pooler.")}
    if missing:
        raise ModelError(
            f"The weights lack {', '.join(sorted(missing)[:3])}",
            where=name,
            cure="Use the weights that belong to config.json.",
        )
    if found["missing_keys"]:
        model.pooler = None
    return model, tokenizer


def _load_tiny(name: str, wanted: Wanted) -> tuple[Any, Any]:
    _, architecture, *rest = name.split(":")
    model, tokenizer = build_tiny(architecture, *(int(part) for part in rest))
    if wanted.attention != "sdpa":
        model.set_attn_implementation(wanted.attention)
    return model.to(device=wanted.device, dtype=wanted.dtype), tokenizer


def _load_named(name: str, wanted: Wanted) -> tuple[Any, Any]:
    if name in asset_names():
        from temper.data import assets

        return _load_source(str(assets.fetch(name)), name, wanted)
    folder = Path(name).expanduser()
    return _load_source(str(folder) if folder.is_dir() else name, name, wanted)


def _load_source(source: str, name: str, wanted: Wanted) -> tuple[Any, Any]:
    """Model and tokenizer from a folder or a hub name, after what can be checked cheaply."""
    folder = Path(source) if Path(source).is_dir() else None
    if folder is not None:
        check_folder(folder, name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with bars_as_due(is_download=folder is None), explained_errors(name):
        config = _load_config(source, name, wanted)
        check_memory(_count_weights(config, folder, wanted), name, wanted)
        tokenizer = AutoTokenizer.from_pretrained(source, **wanted.common())
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=wanted.dtype,
            # transformers takes sdpa by itself wherever the architecture has it (Gemma 2 does not).
            attn_implementation=None if wanted.attention == "sdpa" else wanted.attention,
            use_safetensors=True,
            **wanted.common(),
        )
    placed: Any = model
    return placed.to(wanted.device).eval(), tokenizer


@contextlib.contextmanager
def bars_as_due(is_download: bool) -> Iterator[None]:
    """Leave transformers' progress bars to downloads on a terminal; it draws them elsewhere too. The setting comes back."""
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from transformers.utils import logging as their_logging

    is_seen = is_download and sys.stderr.isatty()
    # A user who set the hub's variable has decided; switching would only warn.
    if is_seen or HF_HUB_DISABLE_PROGRESS_BARS is not None or not their_logging.is_progress_bar_enabled():
        yield
        return
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.enable_progress_bar()


@contextlib.contextmanager
def explained_errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise explained(error, name) from error


def _load_config(source: str, name: str, wanted: Wanted) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(source, **wanted.common())
    named = config.architectures or []
    writes = any(word in each for each in named for word in ("CausalLM", "LMHead", "ConditionalGeneration"))
    known = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or wanted.trust_remote_code
    if not known or (named and not writes):
        raise ModelError(
            f"This is not a causal language model: {', '.join(named) or config.model_type}",
            where=name,
            cure="Choose a model of the ...ForCausalLM kind.",
        )
    return config


def _count_weights(config: Any, folder: Path | None, wanted: Wanted) -> int | None:
    """Number of weights, from the files' headers or from an empty model; None if it cannot be told."""
    if folder is not None:
        return sum(header_count(path) for path in sorted(folder.glob("*.safetensors")))
    if wanted.trust_remote_code:
        return None
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _check_sizes(model: Any, tokenizer: Any, name: str) -> None:
    """Spare embedding rows are common; ids beyond the rows are not usable."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"The tokenizer has {len(tokenizer)} tokens and the model only {rows} embedding rows",
            where=name,
            cure="Use the tokenizer that belongs to the model.",
        )


def _check_end_of_turn(chat: Chat) -> None:
    """Raise ModelError if the tokenizer splits the tag that ends a reply; odd turns are judged when used."""
    with contextlib.suppress(ConfigError, DataError):
        _ = chat.end_of_turn


def _check_device(device: str | torch.device) -> torch.device:
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"{device!r} is not a device", cure="Write cpu, cuda, cuda:N or mps.") from None
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not present.get(wanted.type, True):
        raise NeedsError(f"There is no device {wanted} here", cure="Use --device cpu.")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise NeedsError(f"There is no device {wanted} here", cure=f"It has {torch.cuda.device_count()}.")
    return wanted


def explained(error: Exception, name: str) -> Exception:
    """The same failure as one of our errors, told by what is in its chain of causes."""
    kinds = {type(link).__name__ for link in _chain(error)}
    text = " ".join(str(link) for link in _chain(error))
    if kinds & {"GatedRepoError"}:
        return NeedsError(
            f"{name} is gated", cure="Accept its terms on the hub, then log in with `hf auth login`."
        )
    if kinds & {"RepositoryNotFoundError", "RevisionNotFoundError"}:
        return ConfigError(f"The hub has no model {name!r}", cure=f"Check owner, name and revision. {FORMS}")
    offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError"}
    if kinds & offline or "offline" in text.lower() or "couldn't connect" in text.lower():
        return NeedsError(
            f"{name!r} is not on this machine and the hub cannot be reached",
            cure="Go online, give a folder, or use 'smollm2-135m', which comes from the package index.",
        )
    if "safetensors" in text:
        return ModelError(f"{name} has no safetensors weights", cure="Choose a revision that has them.")
    if "trust_remote_code" in text:
        return NeedsError(
            f"{name} needs code of its own", cure="Read that code, then allow trust_remote_code."
        )
    return ModelError(f"The model cannot be loaded: {error}", where=name, cure="Check its files.")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
