"""Weights in and out: find a checkpoint, check it, load it, save it. Files, names and layout as LLaDA is published.

Everything is safetensors; no pickle is opened and no code of a checkpoint is run.
"""
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor

TINY = Path(__file__).resolve().parent / "data" / "tiny"
MAX_SHARD_BYTES = 5_000_000_000


def find_checkpoint(name):
    """The folder of a model: the embedded data/tiny, a local folder, or the snapshot of a hub id."""
    folder = TINY if str(name) == "data/tiny" else Path(name)  # data/tiny from any working directory
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # slow to import
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.py"]))
        except (OSError, ValueError) as error:  # ValueError: not of the form of an id
            reason = str(error).splitlines()[0]
            raise SystemExit(f"error: --model {name}: no such folder, and the hub gave no such model ({reason}); "
                             f"without network: hf download {name} elsewhere, then copy the folder here") from None
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "BASE"
        raise SystemExit(f"error: --model {name} is an adapter: fold it in with python lora.py merge {base} {name} OUT, "
                         "then use --model OUT")
    return folder


def read_json(path):
    """The JSON object in a file."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise SystemExit(f"error: {path}: expected a JSON object ({error})") from None


def check_fields(path, values, supported):
    """Exit naming the first field of a JSON file whose value is not in `supported`, {key: values}."""
    for key, allowed in supported.items():
        if values.get(key, allowed[0]) not in allowed:
            raise SystemExit(f"error: {path}: {key} = {values[key]!r} is not supported, only {allowed[0]!r} is")


def open_safetensors(path):
    """safetensors.safe_open, but a file that it cannot open ends the program in one line."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"error: {path}: {error}: an incomplete download, a Git-LFS pointer (run git lfs pull), "
                         "or a pickle (refused: convert it to safetensors)?") from None


def weight_files(folder, shapes, single="model.safetensors"):
    """{path: [names]}: where a checkpoint has its tensors, which must be exactly `shapes`, {name: shape}.

    Reads headers only. Exits naming a tensor that is missing, unexpected, misshaped or not floating point.
    """
    index = folder / f"{single}.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise SystemExit(f"error: {index}: no weight_map, which says where each tensor lies")
    else:
        with open_safetensors(folder / single) as file:
            weight_map = dict.fromkeys(file.keys(), single)
    files = {}
    for name, file_name in weight_map.items():
        if not re.fullmatch(r"\w[\w.-]*\.safetensors", str(file_name)):  # no path that leads elsewhere
            raise SystemExit(f"error: {index}: {file_name!r} of {name} is not a plain .safetensors name")
        files.setdefault(folder / file_name, []).append(name)
    stored = dict.fromkeys(weight_map, "not in the file that the index names")
    for path, names in files.items():
        with open_safetensors(path) as file:
            for name in set(names) & set(file.keys()):
                header = file.get_slice(name)
                kind = "float" if header.get_dtype() in ("F64", "F32", "F16", "BF16") else header.get_dtype()
                stored[name] = f"{kind} {header.get_shape()}"
    needed = {name: f"float {list(shape)}" for name, shape in shapes.items()}
    for name in sorted(stored.keys() | needed.keys()):
        is_stored, is_needed = stored.get(name, "missing"), needed.get(name, "no such tensor")
        if is_stored != is_needed:
            raise SystemExit(f"error: {folder}: tensor {name} is {is_stored}, the model needs {is_needed}")
    return files


def read_tensors(path, names):
    """Yield (name, tensor), one tensor in memory at a time. Exits naming a tensor that holds NaN or Inf."""
    with open_safetensors(path) as file:
        for name in names:
            tensor = file.get_tensor(name)
            if not tensor.isfinite().all():
                raise SystemExit(f"error: {path}: {name} holds NaN or Inf")
            yield name, tensor


@torch.no_grad()
def copy_into(parameter, tensor):
    """Copy a full tensor into a parameter; where FSDP has spread it over processes, this process's rows."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        tensor = distribute_tensor(tensor, mesh, placements, src_data_rank=None)  # None: nothing is sent
    parameter.copy_(tensor)


def full_tensor(parameter):
    """The full values of a parameter on the CPU. Where FSDP has spread it, all processes must call this."""
    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu()


def load_tensors(parameters, folder, single="model.safetensors"):
    """Load a checkpoint that must hold exactly the tensors of `parameters`, {name: parameter}."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    for path, names in weight_files(Path(folder), shapes, single).items():
        for name, tensor in read_tensors(path, names):
            copy_into(parameters[name], tensor)


def save_tensors(parameters, path, is_writer=True):
    """Write {name: parameter} to one file. Every process calls this, since gathering needs all; one writes."""
    tensors = {}
    for name, parameter in parameters.items():
        tensor = full_tensor(parameter)
        if is_writer:
            tensors[name] = tensor
    if is_writer:
        path.touch()
        mode = path.stat().st_mode  # as the umask says: safetensors would let only the owner read
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)


def load_weights(model, folder):
    """Load all weights of the model but its adapters, which have their own files."""
    load_tensors({name: p for name, p in model.named_parameters() if ".lora_" not in name}, folder)


def save_weights(model, folder, is_writer=True):
    """Write config.json and the weights: one file, or shards and an index above MAX_SHARD_BYTES.

    Every process calls this and one writes. Never more than one shard is in memory.
    """
    from huggingface_hub import split_torch_state_dict_into_shards  # slow to import
    folder, parameters = Path(folder), dict(model.named_parameters())
    assert not any(".lora_" in name for name in parameters), "a model with adapters: lora.save_trained"
    on_meta = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in parameters.items()}
    split = split_torch_state_dict_into_shards(on_meta, max_shard_size=MAX_SHARD_BYTES)
    if is_writer:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model.config.raw, indent=2) + "\n")
        index = folder / "model.safetensors.index.json"
        index.unlink(missing_ok=True)  # an older index would win over a single file
        if split.is_sharded:
            rows = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
            index.write_text(json.dumps(rows, indent=2) + "\n")
    for file_name, names in split.filename_to_tensors.items():
        save_tensors({name: parameters[name] for name in names}, folder / file_name, is_writer)
