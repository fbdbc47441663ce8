"""Read the tensors of a PyTorch pickle without running any code that it names.

For checkpoints that torch.load(weights_only=True) refuses because something beside the tensors (a Lightning callback,
a numpy scalar, an options object) is an instance of a class. Here every class and function in the pickle becomes an
inert Placeholder; only tensors and plain containers are rebuilt, by the functions in this file.
"""

import pickle
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle in files that torch.save wrote before version 1.6

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {"ByteStorage": "uint8", "CharStorage": "int8"}  # others are called as their dtype: FloatStorage


class Placeholder:
    """Stands for any class, function or object that a pickle names; does nothing, whatever is done to it."""

    def __new__(cls, *args, **options):
        return object.__new__(cls)

    def __init__(self, *args, **options):
        pass

    def __call__(self, *args, **options):
        return self

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def add(self, value):
        pass


class TensorUnpickler(pickle.Unpickler):
    """pickle.Unpickler that knows tensors and plain containers and turns all else into Placeholders.

    read_storage: (key, bytes) -> (bytes,) uint8 tensor with the contents of that storage.
    """

    def __init__(self, file, read_storage):
        super().__init__(file, encoding="latin1")
        self.read_storage = read_storage
        self.storages = {}

    def find_class(self, module, name):
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): make_dict,
            ("torch", "Size"): make_tuple,
            ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_v3,
            ("torch._tensor", "_rebuild_from_type_v2"): rebuild_subclass,
            ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module in ("torch", "torch.storage", "torch.cuda"):
            if name in DTYPES:
                return DTYPES[name]
            if name.endswith("Storage"):
                return DTYPES.get(STORAGES.get(name, name.removesuffix("Storage").lower()), torch.uint8)
        return Placeholder

    def persistent_load(self, identifier):
        """("storage", dtype, key, location, length[, (key, offset, length) of a view]) -> 1-D tensor."""
        _, dtype, key, _, length, *view = identifier
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a storage of unknown type")
        if key not in self.storages:
            self.storages[key] = self.read_storage(key, length * dtype.itemsize)
        storage = self.storages[key].view(dtype)
        if view and view[0] is not None:  # only torch.save before version 1.6 wrote views
            _, offset, length = view[0]
            return storage[offset : offset + length]
        return storage


def make_dict(*args):
    return {}


def make_tuple(values=()):
    return tuple(values)


def rebuild_tensor(storage, offset, size, stride, *rest):
    return storage.as_strided(size, stride, offset)


def rebuild_tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *rest):
    return storage.view(dtype).as_strided(size, stride, offset)


def rebuild_subclass(rebuild, kind, arguments, *rest):
    return rebuild(*arguments)


def rebuild_parameter(data, *rest):
    return data


def read_pickle(path: Path, meta: bool = False):
    """What torch.save wrote to `path`, all but tensors and plain containers replaced by Placeholders.

    meta: leave the tensors' contents out (device "meta"). Raises an exception of pickle, zipfile, torch or Python for
    files that are damaged or not by torch.save.
    """
    with open(path, "rb") as file:
        if zipfile.is_zipfile(path):
            return _read_zip(path, meta)
        return _read_legacy(file, meta)


def _read_zip(path, meta):
    with zipfile.ZipFile(path) as archive:
        index = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        root = index.removesuffix("data.pkl")
        names = set(archive.namelist())
        order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in names else sys.byteorder
        if order != sys.byteorder:
            raise pickle.UnpicklingError(f"its numbers are {order}-endian")

        def read_storage(key, size):
            if meta:
                return torch.empty(size, dtype=torch.uint8, device="meta")
            return _bytes_tensor(archive.read(f"{root}data/{key}"), size)

        with archive.open(index) as file:
            return TensorUnpickler(file, read_storage).load()


def _read_legacy(file, meta):
    def no_storage(key, size):
        raise pickle.UnpicklingError("a storage outside the object")

    header = [TensorUnpickler(file, no_storage).load() for _ in range(3)]  # magic number, version, system
    if header[0] != LEGACY_MAGIC:
        raise pickle.UnpicklingError("not written by torch.save")
    storages = {}  # filled below: the contents follow the object

    def read_storage(key, size):
        storages[key] = torch.empty(size, dtype=torch.uint8, device="meta" if meta else "cpu")
        return storages[key]

    result = TensorUnpickler(file, read_storage).load()
    for key in [] if meta else TensorUnpickler(file, no_storage).load():
        file.seek(8, 1)  # number of elements, known from the object
        size = len(storages[key])
        storages[key].copy_(_bytes_tensor(file.read(size), size))
    return result


def _bytes_tensor(content, size):
    if len(content) < size:
        raise pickle.UnpicklingError("the file is cut short")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[:size] if size else torch.empty(0, dtype=torch.uint8)
