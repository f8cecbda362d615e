"""Convert a stock checkpoint to one with depth attention that computes the same logits, up to rounding.

The files of the weights are linked. New files contain the depth parameters (usually one small shard), the index of all
tensors, the config, the model code and a model card.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from ..checkpoints.carried_files import carry_files, check_carried, check_tokenizer
from ..checkpoints.checkpoint_files import (
    TensorEntry,
    shard_name,
    write_index,
    write_shard,
)
from ..checkpoints.weights_check import check_weights
from ..configuration_depthattn import DepthAttnConfig
from ..depth_connections import CONNECTIONS
from ..depth_options import (
    DEPTH_OPTIONS,
    DepthConnectionType,
    DepthKVType,
    option_default,
    require_member,
)
from ..errors import UserError
from ..errors.messages import one_line
from ..model_card import describe_connection, describe_depth_kv
from ..utils.paths import user_path
from ..utils.progress import progress_bar
from ..utils.text_table import few, table, weights_summary
from .architecture import Architecture
from .depth_shards import depth_values, plan_depth_shards, weights_dtype
from .model_card import write_model_card
from .output_folder import (
    ByteCounts,
    check_target,
    complete_folder,
    place_weights,
)
from .source import StockSource, read_stock_source
from .source_folder import source_folder
from .upload import full_repository_id, upload_checkpoint


@dataclass(frozen=True)
class RetrofitReport:
    """The report of `retrofit`.

    Attributes:
        source: folder or Hub id of the stock checkpoint, or description of the model in memory.
        output_dir: the new checkpoint.
        model_type: the host's model type.
        num_hidden_layers: number of decoder layers.
        architecture: class of the new checkpoint.
        connection: description of the depth connection.
        sublayers_per_block: number of sublayers per block; 1 is Full AttnRes.
        num_sources: with AttnRes, number of sources of the output site: the embedding, finished blocks and the open
            block; otherwise 1.
        depth_kv: description of MoDA; `None` without it.
        num_slots: the largest number of slots that a layer reads.
        num_depth_parameters: number of new parameters; float32, except for MoDA's projections.
        num_projection_parameters: number of those in MoDA's projections, which have the dtype of the host's weights.
        bytes_linked: size of the weights that are hard links to the source.
        bytes_copied: size of the weights that were copied.
        bytes_written: size of the new weights.
        unused_tensors: tensors that the model class ignores (other heads, vision parts); they are kept in the weight
            files.
        tokenizer_code: files of the tokenizer's own code that were copied; they run with `trust_remote_code=True`.
        seconds: duration.
        repository: address of the Hub repository to which it was uploaded; `None` without an upload.
    """

    source: str
    output_dir: str
    model_type: str
    num_hidden_layers: int
    architecture: str
    connection: str
    sublayers_per_block: int
    num_sources: int
    depth_kv: str | None
    num_slots: int
    num_depth_parameters: int
    num_projection_parameters: int
    bytes_linked: int
    bytes_copied: int
    bytes_written: int
    unused_tensors: tuple[str, ...]
    tokenizer_code: tuple[str, ...]
    seconds: float
    repository: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dict for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [
            ("source", f"{self.source} ({self.model_type}, {self.num_hidden_layers} layers)"),
            ("output", f"{self.output_dir} ({self.architecture})"),
            ("connection", self.connection),
            *([("sources", f"{self.num_sources} at the output")] if self.num_sources > 1 else ()),
            *([("depth slots", f"at most {self.num_slots} in a layer: {self.depth_kv}")] if self.depth_kv else ()),
            ("depth parameters", self._depth_parameters()),
            ("weights", weights_summary(self.bytes_linked, self.bytes_copied, self.bytes_written)),
            *([("ignored", few(self.unused_tensors))] if self.unused_tensors else ()),
            *([("tokenizer code", ", ".join(self.tokenizer_code))] if self.tokenizer_code else ()),
            *([("uploaded to", self.repository)] if self.repository else ()),
            ("time", f"{self.seconds:.1f} s"),
        ]
        return table(rows)

    def _depth_parameters(self) -> str:
        in_projections = self.num_projection_parameters
        summary = f"{self.num_depth_parameters - in_projections:,}, float32"
        return summary + (f", and {in_projections:,} in projections" if in_projections else "")


def retrofit(
    source: str | Path | PreTrainedModel,
    output_dir: str | Path,
    *,
    overwrite: bool = False,
    revision: str | None = None,
    copy: bool = False,
    require_tokenizer: bool = False,
    copy_tokenizer_code: bool = False,
    ignore_model_code: bool = False,
    push_to: str | None = None,
    private: bool | None = None,
    progress: bool | None = None,
    **options: Any,
) -> RetrofitReport:
    """Convert a stock checkpoint to one with depth attention that computes the same logits, up to rounding.

    `output_dir` is created only when the checkpoint is complete. Where the file system supports it, its weights are
    hard links to the source: a program that overwrites one of these files in place changes both checkpoints
    (`save_pretrained` of transformers does not). Less than 1 GB of memory is needed for a checkpoint of any size.

    Args:
        source: local folder or Hub id of a checkpoint of a supported host, with unquantised safetensors weights; or a
            model of transformers in memory, such as one that was dequantised while loading. Its tokenizer is saved to
            `output_dir` afterwards.
        output_dir: the folder to create.
        overwrite: replace an existing checkpoint at `output_dir`, once the new one is complete.
        revision: branch, tag or commit of a Hub repository.
        copy: copy the weights instead of hard-linking them.
        require_tokenizer: raise instead of warning if the source has no tokenizer.
        copy_tokenizer_code: copy the code of a tokenizer with custom code, instead of raising. It runs when the output
            is loaded with `trust_remote_code=True`.
        ignore_model_code: use the class of transformers for a source with custom model code, instead of raising.
        push_to: Hub repository (`name` or `owner/name`) to which the complete folder is uploaded; it is created if
            necessary, and weights that it has are replaced.
        private: whether a new repository is private, and a public one is refused; by default the Hub decides, and most
            are public.
        progress: whether to show progress; `None`: a bar on a terminal, a line every few seconds elsewhere.
        **options: options of `DepthAttnConfig` (`connection`, `num_blocks`, `depth_kv`, `query`, ...). Defaults differ
            from the config where needed to reproduce the host: `read_scale="sum"` and, with `depth_kv`,
            `depth_gate="head"`. With `connection="residual"` and no `depth_kv`, the result is a baseline: the
            unchanged host in our classes. MoDA's projections are initialised with a fixed seed.

    Returns:
        The report; `str` formats it as a table.

    Raises:
        UserError: if the source cannot be retrofitted, an option does not reproduce the host, or the output cannot be
            written or uploaded.
    """
    started = time.perf_counter()
    target = user_path(output_dir).resolve()
    check_target(target, overwrite)
    with source_folder(source, target, revision) as found:
        folder = found.folder
        stock = read_stock_source(folder, ignore_model_code=ignore_model_code)
        code = check_carried(folder, stock.weights.weight_map.values(), copy_tokenizer_code=copy_tokenizer_code)
        config = retrofit_config(stock.config, stock.architecture, options)
        check_tokenizer(folder, require_tokenizer, found.name)
        unused = check_weights(str(folder), stock.config, stock.host_class, stock.entries)
        repository = None if push_to is None else full_repository_id(push_to, private=private)
        counts = ByteCounts()
        with complete_folder(target, overwrite) as partial:
            carry_files(folder, partial)
            num_parameters = _write_weights(partial, config, stock, counts, copy=copy, progress=progress)
            write_model_card(
                partial,
                config,
                name=target.name,
                repository=repository,
                hub_id=found.hub_id,
                source_folder=folder,
                depth_class=stock.architecture.depth_class,
                num_depth_parameters=sum(num_parameters.values()),
            )
            # Last, since an incomplete folder without config cannot be loaded.
            config.save_pretrained(partial)
    if found.is_saved_model:
        # The saved model is gone, and its files belong to the output alone.
        counts = ByteCounts(written=counts.linked + counts.copied + counts.written)
    address = None
    if repository is not None:
        message = f"Retrofit {found.hub_id or stock.config.model_type} with hf-depthattn"
        address = upload_checkpoint(target, repository, message=message, private=private)
    is_attn_res = config.connection == DepthConnectionType.ATTN_RES
    return RetrofitReport(
        source=found.name,
        output_dir=str(output_dir),
        model_type=stock.config.model_type,
        num_hidden_layers=stock.config.num_hidden_layers,
        architecture=stock.architecture.depth_class,
        connection=describe_connection(config),
        sublayers_per_block=config.block_size_sublayers,
        num_sources=config.num_sources(config.num_sublayers) if is_attn_res else 1,
        depth_kv=describe_depth_kv(config),
        num_slots=max(config.depth_slot_plan.num_read),
        num_depth_parameters=sum(num_parameters.values()),
        num_projection_parameters=num_parameters["mlp_depth_kv"],
        bytes_linked=counts.linked,
        bytes_copied=counts.copied,
        bytes_written=counts.written,
        unused_tensors=tuple(unused),
        tokenizer_code=tuple(code),
        seconds=time.perf_counter() - started,
        repository=address,
    )


def retrofit_config(host: PreTrainedConfig, architecture: Architecture, options: Mapping[str, Any]) -> DepthAttnConfig:
    """Return the config of a retrofitted checkpoint.

    Args:
        host: the host's config.
        architecture: the checkpoint's architecture.
        options: options of `DepthAttnConfig`.

    Raises:
        UserError: if an option is unknown, or has a value that is not allowed or does not reproduce the host.
    """
    for name in sorted(set(options) - set(DEPTH_OPTIONS)):
        raise UserError(f"{name}: not an option of retrofit; choose from {', '.join(DEPTH_OPTIONS)}.")
    _check_starts_as_host(options.get("connection", option_default("connection")))
    exact = _exact_options(options)
    try:
        return DepthAttnConfig(text_config=host, architectures=[architecture.depth_class], **exact)
    except (StrictDataclassError, ValueError, TypeError) as error:
        # Strict configs raise errors of huggingface_hub; the innermost error names field and value.
        raise UserError(one_line(error)) from error


def _check_starts_as_host(connection: str) -> None:
    """Check that models with this connection and initial parameters compute what their hosts compute."""
    try:
        require_member("connection", connection, DepthConnectionType)
    except ValueError as error:
        raise UserError(str(error)) from error
    kind = CONNECTIONS[DepthConnectionType(connection)]
    if not kind.starts_as_host:
        exact = ", ".join(repr(str(name)) for name, other in CONNECTIONS.items() if other.starts_as_host)
        raise UserError(
            f"connection: {str(connection)!r} does not reproduce the host ({kind.inexact_reason}) and is for training "
            f"from scratch; choose from {exact}."
        )


def _exact_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options, completed by the values that are needed to reproduce the host."""
    connection = options.get("connection", option_default("connection"))
    depth_kv = options.get("depth_kv")
    if depth_kv is None:
        for name, option in DEPTH_OPTIONS.items():
            if option.is_moda and options.get(name) not in (None, option_default(name)):
                known = " or ".join(repr(str(kind)) for kind in DepthKVType)
                raise UserError(f"{name}: {options[name]!r} has no effect without depth_kv ({known}).")
    exact = dict(options)
    for name, option in DEPTH_OPTIONS.items():
        if option.exact is ... or (option.is_moda and depth_kv is None):
            continue
        value = options.get(name, option.exact)
        if value != option.exact:
            raise UserError(
                f"{name}: {value!r} does not reproduce the host ({option.inexact_reason}); only {option.exact!r} does."
            )
        # An option without effect would cause a warning whenever the checkpoint is loaded.
        if option.has_effect(connection, depth_kv):
            exact[name] = option.exact
        else:
            exact.pop(name, None)
    return exact


def _write_weights(
    folder: Path,
    config: DepthAttnConfig,
    stock: StockSource,
    counts: ByteCounts,
    *,
    copy: bool,
    progress: bool | None,
) -> Counter[str]:
    """Place the host's shards, write depth shards and index, and return the number of parameters by module name."""
    weights = stock.weights
    host_entries = list(stock.entries.values())
    depth_shards = plan_depth_shards(config, stock.key_prefix, weights_dtype(host_entries))
    total = len(weights.shards) + len(depth_shards)
    # transformers prefers a file called model.safetensors to an index, so even a single host shard gets a number.
    new_name = {shard.path.name: shard_name(i, total) for i, shard in enumerate(weights.shards, start=1)}
    with progress_bar(weights.num_bytes, "weights", progress, unit="B") as bar:
        for shard in weights.shards:
            place_weights(shard.path, folder / new_name[shard.path.name], counts, copy=copy, on_bytes=bar.update)
    weight_map = {tensor: new_name[name] for tensor, name in weights.weight_map.items()}
    depth_entries = []
    num_parameters: Counter[str] = Counter()
    for number, modules in enumerate(depth_shards, start=len(weights.shards) + 1):
        name = shard_name(number, total)
        tensors = {tensor: layout for module in modules for tensor, layout in module.tensors.items()}
        counts.written += write_shard(folder / name, tensors, depth_values(config, modules))
        weight_map |= dict.fromkeys(tensors, name)
        depth_entries += [TensorEntry(dtype, shape, 0, num_bytes) for dtype, shape, num_bytes in tensors.values()]
        for module in modules:
            num_parameters[module.leaf] += module.num_parameters
    write_index(folder, weight_map, [*host_entries, *depth_entries])
    return num_parameters
