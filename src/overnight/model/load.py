"""Any model of a folder or of the Hub: weights from safetensors alone, and no code or kernel that comes with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from overnight.core.files import errno_of
from overnight.errors import InputError, Unreachable, first_line, network_away
from overnight.run_dir.layout import model_at, refuse_damaged_model

BUILT_IN = (None, "eager", "sdpa", "grouped_mm", "batched_mm")  # implementations for which nothing is fetched


def load_model(name: str, **how: Any) -> tuple[Any, dict[str, Any], Any]:
    """The model of a run, folder or Hub name as transformers gives it, which weights did not fit, and its tokenizer.

    Raises `InputError` for what is none or would need code or a pickle, `DamagedData` for a folder that is not as it
    was written, and OSError where the system refuses a file.
    """
    name = model_at(name)
    try:
        if Path(name).is_dir():
            refuse_damaged_model(Path(name))
        config, _ = PretrainedConfig.get_config_dict(name)
        if not config:
            raise InputError(f"{name}: no config.json there, so no model; runs/NAME/models/iter-... is one")
        if code := sorted(set(code_in(config))):
            raise InputError(
                f"{name}: no model can be loaded from there: its config.json names code that is never fetched or run"
                f" ({', '.join(code)}); a model of an architecture that transformers has works"
            )
        refuse_foreign_shards(name)
        how |= {"trust_remote_code": False, "use_safetensors": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, **how)
        model, misfits = loaded
        if missing := sorted(misfits["missing_keys"]):
            raise InputError(
                f"{name}: its weights lack {missing[0]} and {len(missing) - 1} more that its config.json names"
            )
        return model, misfits, AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except InputError:
        raise
    except Exception as error:  # the Hub client, its transport and the parsers share no base class
        if errno_of(error) is not None:
            raise
        if network_away(error):
            raise Unreachable(
                f"{name}: the Hub cannot be reached ({first_line(error)}); the same command continues when it can, and"
                " a model in a folder needs no network"
            ) from error
        raise InputError(f"{name}: no model can be loaded from there: {first_line(error)}") from error


def refuse_foreign_shards(name: str) -> None:
    """Raise `InputError` for an index that names anything but safetensors files beside it: transformers reads that."""
    index = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    for shard in set(json.loads(Path(index).read_bytes())["weight_map"].values()) if index else ():
        if not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise InputError(f"{index} names {shard!r}, which is no safetensors file beside it")


def code_in(config: dict[str, Any]) -> Iterator[str]:
    """The keys of a configuration, and of those in it, that name code: classes of its own, or kernels of the Hub."""
    for key, value in config.items():
        if key in ("auto_map", "quantization_config"):
            yield key
        elif key.endswith("_implementation"):
            asked = value.values() if isinstance(value, dict) else [value]
            yield from (f"{key}: {each}" for each in asked if each not in BUILT_IN)
        elif isinstance(value, dict):
            yield from code_in(value)
