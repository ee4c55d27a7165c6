"""A GPU played by the CPU: scripts run on it unchanged, with real numbers; what a GPU refuses or waits for is seen.

    with PretendedGPU() as gpu:                                  # torch.cuda.is_available() says True in here
        run_dir = mbpo.main(mbpo.Args(..., cudagraphs=True))
        with gpu.no_waiting():                                   # whatever waits, or uploads, raises in here
            mbpo.update_policy(...)
    gpu.waits                                                    # Counter of (kind, function, statement)

A tensor on this GPU says `cuda:0` to Python and is `meta` to C++, which needs neither driver nor streams for that; its
numbers are in a CPU tensor, on which every operation is run. So autograd, optimizers, checkpoints and resuming work,
and a run has the numbers of a CPU run. Beyond that it behaves as a GPU does:
  * operands on two devices raise, and so do generators of another device and `.numpy()`;
  * "sync" (item, nonzero, a boolean mask, .cpu(), ...) and "upload" (what is copied there from the CPU) are counted;
  * a CUDA graph is recorded, not executed, and each replay works on the same memory: Python numbers are frozen, inputs
    that are not copied in stay what they were, the next replay overwrites the results. While it is recorded, a sync, an
    upload, an unknown generator or an optimizer that is not capturable raises;
  * what one stream has written, another reads only after wait_stream.
Not seen: kernels (precision, autocast, cuDNN, determinism), speed, the size of the memory, torch.compile, what memory
that is freed is used for next. An operation costs 25 to 65 us.
"""

import contextlib
import functools
import linecache
import os
import sys
from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten, CPU, CUDA, META = torch.ops.aten, torch.device("cpu"), torch.device("cuda", 0), torch.device("meta", 0)
NOT_OURS = os.path.dirname(torch.__file__), contextlib.__file__, functools.__file__, __file__, "<"  # files of helpers
INDEXING = {aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put_.default, aten.index_put.default}
WAITS = {  # for numbers that the host or the shape of the result needs
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default, aten.bincount.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
COPIES = {aten._to_copy.default, aten.copy_.default}


class OnGPU(torch.Tensor):
    """A tensor on the pretended GPU; its numbers are those of the CPU tensor `host`."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu, is_meta = property(lambda self: CUDA), True, False, False

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, host.shape, dtype=host.dtype, device=META, **layout)
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendedGPU.active.run(func, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self) -> str:
        return f"{self.host!r} on {CUDA}"

    def __reduce_ex__(self, protocol):  # into a file, which is read with map_location="cpu"
        return self.host.detach().__reduce_ex__(protocol)


class Generator(torch.Generator):
    """A torch.Generator that says on which device it is; the numbers are the CPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.place = CUDA if torch.device(device).type == "cuda" else CPU
        return self

    device = property(lambda self: self.place)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        """All that the other one may read by now, this one may."""
        for readers in PretendedGPU.active.written.values():
            if other in readers:
                readers.add(self)

    def is_capturing(self) -> bool:
        return PretendedGPU.active.graph is not None


class Graph:
    """The operations of a capture, and their memory."""

    def __init__(self):
        self.calls, self.made, self.before, self.generators = [], {}, {}, {}

    def register_generator_state(self, generator: Generator) -> None:
        self.generators[generator] = generator.get_state()

    def undo(self) -> None:
        """A capture computes nothing: what it has changed is as before, what it has made holds no numbers."""
        for storage, copy in self.before.values():
            storage.copy_(copy)
        for tensor in self.made.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        for generator, state in self.generators.items():
            generator.set_state(state)

    def replay(self) -> None:
        gpu = PretendedGPU.active
        gpu.replays += 1
        for func, args, kwargs, results in self.calls:
            for x in tensors((args, kwargs)):
                gpu.may_read(x, func)
            for old, new in zip(results, tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                gpu.writes(old)


def tree_map(function, tree):
    """Of lists, tuples and dictionaries: what arguments are nested in."""
    if type(tree) is dict:
        return {name: tree_map(function, value) for name, value in tree.items()}
    return type(tree)([tree_map(function, x) for x in tree]) if type(tree) in (list, tuple) else function(tree)


def on_host(x):
    return x.host if isinstance(x, OnGPU) else CPU if isinstance(x, torch.device) else x


def tensors(tree) -> list[torch.Tensor]:
    found = []
    tree_map(lambda x: found.append(x) if isinstance(x, torch.Tensor) else None, tree)
    return found


def address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@functools.cache
def effects(func) -> tuple[bool, bool, list]:
    """Is the result of an operation a view, is it an argument? Which arguments are written to, place and name?"""
    aliases = [result.alias_info.is_write for result in func._schema.returns if result.alias_info is not None]
    arguments = enumerate(func._schema.arguments)
    written = [(i, argument.name) for i, argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return False in aliases, True in aliases, written


class Functions(TorchFunctionMode):
    """What PyTorch decides before the dispatcher: where a new tensor goes, and that a number is on the CPU at first."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if isinstance(kwargs.get("device"), str):
            kwargs["device"] = torch.device(kwargs["device"])
        args, kwargs = tree_map(
            lambda x: META if isinstance(x, torch.device) and x.type == "cuda" else x, (args, kwargs)
        )
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            return func(*args, **kwargs | {"device": None}).to(META)
        if func is torch.Tensor.__setitem__ and isinstance(args[0], OnGPU) and isinstance(args[2], int | float):
            args = [*args[:2], torch.tensor(args[2], dtype=args[0].dtype)]
        gpu = PretendedGPU.active
        gpu.generator, outer = kwargs.get("generator"), gpu.generator  # the dispatcher is given another object
        try:
            return func(*args, **kwargs)
        finally:
            gpu.generator = outer


class PretendedGPU(TorchDispatchMode):
    active: "PretendedGPU | None" = None

    def __init__(self):
        super().__init__()
        self.waits, self.forbidden, self.graph, self.generator = Counter(), False, None, None
        self.replays, self.stream, self.written = (
            0,
            Stream(),
            {},
        )  # address: the streams that may read what is there

    def __enter__(self):
        PretendedGPU.active, self.undo = self, contextlib.ExitStack()
        cuda = {
            "is_available": lambda: True, "mem_get_info": lambda device=None: (2**40, 2**40), "Stream": Stream,
            "current_stream": lambda: self.stream, "stream": self.on_stream, "CUDAGraph": Graph, "graph": self.capture,
        }  # fmt: skip
        for name, value in cuda.items():
            self.patch(torch.cuda, name, value)
        self.patch(torch.accelerator, "current_accelerator", lambda *args, **kwargs: CUDA)  # optimizers ask
        self.patch(torch.accelerator, "current_stream", lambda: self.stream)
        self.patch(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
        self.patch(torch, "Generator", Generator)
        for name in ("__enter__", "__exit__"):  # inference tensors cannot be wrapped
            self.patch(torch.inference_mode, name, getattr(torch.no_grad, name))
        conversion = torch.__future__.set_overwrite_module_params_on_conversion
        self.undo.callback(conversion, torch.__future__.get_overwrite_module_params_on_conversion())
        conversion(True)  # a module that goes to another device has new parameters
        self.undo.enter_context(Functions())
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.undo.close()
        PretendedGPU.active = None

    def patch(self, owner, name: str, value) -> None:
        self.undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    @contextlib.contextmanager
    def on_stream(self, stream: Stream):
        self.stream, outer = stream, self.stream
        yield
        self.stream = outer

    @contextlib.contextmanager
    def capture(self, graph: Graph):
        for readers in self.written.values():  # a capture begins with a synchronisation of all streams
            readers.add(self.stream)
        self.graph = graph
        try:
            yield
        finally:
            self.graph = None
        graph.undo()

    @contextlib.contextmanager
    def no_waiting(self):
        """Within, a sync or an upload raises."""
        self.forbidden, outer = True, self.forbidden
        try:
            yield
        finally:
            self.forbidden = outer

    def wait(self, kind: str, func) -> None:
        """Counts a sync or an upload for the statement of the innermost frame that is neither torch's nor ours."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(NOT_OURS):
            frame = frame.f_back
        code, line = frame.f_code, linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        self.waits[kind, code.co_qualname, line] += 1
        if self.graph is not None or self.forbidden:
            where = "in a capture" if self.graph is not None else "where none may be"
            raise RuntimeError(f"{kind} {where}: {func} in {code.co_qualname}, line {frame.f_lineno}: {line}")

    def writes(self, host: torch.Tensor) -> None:
        self.written[address(host)] = {self.stream}

    def may_read(self, host: torch.Tensor, func) -> None:
        readers = self.written.get(address(host), {self.stream})
        if self.stream not in readers and self.graph is None:
            raise RuntimeError(f"{func} reads what another stream has written: no wait_stream in between")

    def check_operands(self, func, args: tuple, operands: list) -> None:
        """Refuses operands on two devices, but for the exceptions that PyTorch makes; counts what these cost."""
        others = [x for x in operands if not isinstance(x, OnGPU)]
        numbers = all(x.dim() == 0 for x in others)
        if func in INDEXING:  # indices may be on the CPU, and a number that is stored
            stored = [x for x in args[2:3] if not isinstance(x, OnGPU)]
            mask = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
            if mask and not (stored and numbers and len(args[1]) == 1):  # else it is a masked_fill_
                self.wait("sync", func)
            elif others and not mask:
                self.wait("upload", func)
            allowed = isinstance(args[0], OnGPU) and all(x.dim() == 0 for x in stored)
        elif func in WAITS:
            self.wait("sync", func)
            allowed = not others
        else:  # numbers may be on the CPU where the kernel works number by number
            allowed = not others or numbers and (torch.Tag.pointwise in func.tags or func is aten.fill_.Tensor)
            allowed = allowed and (isinstance(args[0], OnGPU) or not func._schema.is_mutable or not others)
            if others and allowed and func is aten.where.self:
                self.wait("upload", func)
        if not allowed:
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} has cuda:0 and cpu operands")

    def check_generator(self, func, on_gpu: bool) -> None:
        if self.generator is None or torch.Tag.nondeterministic_seeded not in func.tags:
            return
        if (self.generator.device.type == "cuda") != on_gpu:
            raise RuntimeError(f"{func}: the generator is on {self.generator.device}, the tensor is not")
        if on_gpu and self.graph is not None and self.generator not in self.graph.generators:
            raise RuntimeError(f"{func}: a graph does not know the generator that it draws from")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args: tuple, kwargs: dict):
        """One operation: what a GPU would say to it, then its result."""
        operands = tensors((args, kwargs))
        inputs = [x.host for x in operands if isinstance(x, OnGPU)]
        device = kwargs.get("device")
        on_gpu = device == META if device is not None else bool(inputs)
        if func is aten.copy_.default:
            on_gpu = isinstance(args[0], OnGPU)
        if on_gpu or inputs:
            if func in COPIES:
                source = args[func is aten.copy_.default]
                if isinstance(source, OnGPU) != on_gpu:
                    self.wait("upload" if on_gpu else "sync", func)
            else:
                self.check_operands(func, args, operands)
        self.check_generator(func, on_gpu)
        if not on_gpu and not inputs:
            return func(*args, **kwargs)
        for x in inputs:
            self.may_read(x, func)
        host_args, host_kwargs = tree_map(on_host, (args, kwargs))
        is_view, in_place, places = effects(func)
        changed = tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in places])
        if self.graph is not None:
            for x in (x.host for x in changed if address(x.host) not in self.graph.made | self.graph.before):
                self.graph.before[address(x)] = x.untyped_storage(), x.untyped_storage().clone()
        result = func(*host_args, **host_kwargs)
        if not on_gpu:
            return result
        results = tensors(result)
        if not is_view:
            for x in [x.host for x in changed] or results:
                self.writes(x)
            if self.graph is not None:
                self.graph.calls.append((func, host_args, host_kwargs, results))
                self.graph.made |= {} if changed else {address(x): x for x in results}
        if in_place:
            return changed[0] if len(changed) == 1 else tuple(changed)
        return tree_map(lambda x: OnGPU(x) if isinstance(x, torch.Tensor) else x, result)
