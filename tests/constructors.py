"""Which parameters a model has, read from the source of its constructors without importing it.

A constructor is followed statement by statement. Its expressions are evaluated with no builtins but
the few below, classes of the same source trees are followed in turn, and the layers that hold
parameters (linear, convolution, embedding, norm) are replaced by their shapes. Whatever is not
known stays UNKNOWN: a shape with such a size is not compared.
"""

import ast
import builtins
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SAFE = ("range", "zip", "enumerate", "len", "int", "float", "max", "min", "sum", "list", "tuple")
Shape = tuple[int, ...] | None  # None: it cannot be computed from the config


class Unknown:
    """A value that the source does not tell: any use of it is unknown, too, and it counts as true.

    Conditions of constructors ask for the platform, the rank and the limits of a request.
    """

    def __call__(self, *arguments: Any, **named: Any) -> "Unknown":
        return self

    def __getattr__(self, name: str) -> "Unknown":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def _same(self, other: Any = None) -> "Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _same
    __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = _same
    __mod__ = __lt__ = __gt__ = __le__ = __ge__ = __getitem__ = __neg__ = _same
    __iter__ = None  # Python would iterate by __getitem__, without an end


UNKNOWN = Unknown()


class Config:
    """A section of config.json as the source reads it: by attributes."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def __getattr__(self, name: str) -> Any:
        return _wrapped(self.values[name]) if name in self.values else UNKNOWN

    def get_text_config(self) -> "Config":
        return self


def _wrapped(value: Any) -> Any:
    return Config(value) if isinstance(value, dict) else value


class Size(tuple):
    """The shape of a tensor that a constructor makes, as in torch.zeros(3) * alpha."""

    def __mul__(self, other: Any) -> "Size":  # type: ignore[override]
        return self


@dataclass(eq=False)
class Parameter:
    """The shape of a parameter, and of its shards if several stored tensors fill it."""

    shape: Shape
    shards: dict[str | int, Shape] = field(default_factory=dict)


class Part:
    """What a constructor made: children, parameters, persistent buffers and other attributes."""

    def __init__(self, source: "Class | None" = None):
        self.source = source
        self.children: dict[str, Part] = {}
        self.parameters: dict[str, Parameter] = {}
        self.buffers: set[str] = set()
        self.values: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        for found in (self.children, self.parameters, self.values):
            if name in found:
                return found[name]
        if self.source is None:
            return UNKNOWN
        if name in self.source.methods():
            return lambda *given, **named: self.source.run(name, self, *given, **named)["return"]
        return self.source.constant(name)

    def __len__(self) -> int:
        return len(self.children)

    def __bool__(self) -> bool:
        return True

    def put(self, name: str, value: Any) -> None:
        """The statement self.name = value."""
        for found in (self.children, self.parameters, self.values):
            found.pop(name, None)
        kinds = {Part: self.children, Parameter: self.parameters}
        kinds.get(type(value), self.values)[name] = value

    def append(self, child: Any) -> None:
        self.put(str(len(self.children)), child)

    def register_buffer(self, name: str, value: Any = None, persistent: bool = True) -> None:
        if persistent:
            self.buffers.add(name)

    def tie_weights(self, other: "Part") -> "Part":
        """vLLM: a text head that shares the weights of the embedding."""
        return other

    def tensors(self, prefix: str = "") -> dict[str, Parameter]:
        """Name -> parameter of it and all parts below."""
        found = {prefix + name: parameter for name, parameter in self.parameters.items()}
        for name, child in self.children.items():
            found.update(child.tensors(f"{prefix}{name}."))
        return found

    def buffer_names(self, prefix: str = "") -> set[str]:
        """Names of the persistent buffers of it and all parts below."""
        found = {prefix + name for name in self.buffers}
        for name, child in self.children.items():
            found |= child.buffer_names(f"{prefix}{name}.")
        return found


# Layers that hold parameters, as PyTorch and vLLM construct them


def leaf(**parameters: Parameter | None) -> Part:
    """A part that has parameters of its own only."""
    part = Part()
    for name, parameter in parameters.items():
        if parameter is not None:
            part.put(name, parameter)
    return part


def shape(*sizes: Any) -> Shape:
    """Sizes -> a shape, or None if one of them is unknown."""
    return None if any(not isinstance(size, int) for size in sizes) else sizes


def linear(*sizes: Any, bias: Any = True, **named: Any) -> Part:
    """nn.Linear, ColumnParallelLinear, RowParallelLinear: inputs, outputs and perhaps the bias."""
    names = ("in_features", "input_size", "out_features", "output_size")
    sizes += tuple(named[name] for name in names if name in named)
    bias = sizes[2] if len(sizes) > 2 else bias
    weight = Parameter(shape(sizes[1], sizes[0]))
    return leaf(weight=weight, bias=Parameter(shape(sizes[1])) if bias else None)


def stacked(inputs: Any, outputs: dict[str | int, Any], bias: Any) -> Part:
    """A linear layer whose outputs are those of several stored ones, one after the other."""
    rows = sum(outputs.values())
    weights: dict[str | int, Shape] = {key: shape(n, inputs) for key, n in outputs.items()}
    biases: dict[str | int, Shape] = {key: shape(n) for key, n in outputs.items()}
    weight = Parameter(shape(rows, inputs), weights)
    return leaf(weight=weight, bias=Parameter(shape(rows), biases) if bias else None)


def merged(input_size: Any, output_sizes: list, bias: Any = True, **_: Any) -> Part:
    """vLLM's MergedColumnParallelLinear; shards have numbers."""
    return stacked(input_size, dict(enumerate(output_sizes)), bias)


def qkv(
    hidden_size: Any,
    head_size: Any,
    total_num_heads: Any,
    total_num_kv_heads: Any = None,
    bias: Any = True,
    **_: Any,
) -> Part:
    """vLLM's QKVParallelLinear; shards are q, k and v."""
    heads = total_num_kv_heads or total_num_heads
    outputs = {"q": total_num_heads * head_size, "k": heads * head_size, "v": heads * head_size}
    return stacked(hidden_size, outputs, bias)


def embedding(rows: Any, width: Any, **_: Any) -> Part:
    return leaf(weight=Parameter(shape(rows, width)))


def rms_norm(width: Any, **_: Any) -> Part:
    return leaf(weight=Parameter(shape(width)))


def layer_norm(width: Any, elementwise_affine: bool = True, **_: Any) -> Part:
    if not elementwise_affine:
        return leaf()
    return leaf(weight=Parameter(shape(width)), bias=Parameter(shape(width)))


def convolution(
    dimensions: int,
    transposed: bool,
    in_channels: Any,
    out_channels: Any,
    kernel_size: Any,
    *_: Any,
    bias: bool = True,
    **__: Any,
) -> Part:
    kernel = (kernel_size,) * dimensions if isinstance(kernel_size, int) else tuple(kernel_size)
    channels = (in_channels, out_channels) if transposed else (out_channels, in_channels)
    weight = Parameter(shape(*channels, *kernel))
    return leaf(weight=weight, bias=Parameter(shape(out_channels)) if bias else None)


def module_list(parts: Any = ()) -> Part:
    """nn.ModuleList; children that are not parts have no parameters, but a number."""
    made = Part()
    for i, part in enumerate(parts):
        made.put(str(i), part if isinstance(part, Part) else Part())
    return made


def make_layers(count: int, layer: Any, prefix: str = "") -> tuple[int, int, Part]:
    """vLLM's: first layer, last layer and all layers of this process."""
    return 0, count, module_list(layer(prefix=prefix) for _ in range(count))


def size(*sizes: Any, **_: Any) -> Size:
    return Size(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes)


def parameter(value: Any = UNKNOWN, **_: Any) -> Parameter:
    return Parameter(shape(*value) if isinstance(value, Size) else None)


LAYERS: dict[str, Any] = {
    "Linear": linear,
    "ColumnParallelLinear": linear,
    "RowParallelLinear": linear,
    "ReplicatedLinear": linear,
    "MergedColumnParallelLinear": merged,
    "QKVParallelLinear": qkv,
    "Embedding": embedding,
    "VocabParallelEmbedding": embedding,
    "ParallelLMHead": embedding,
    "RMSNorm": rms_norm,
    "LayerNorm": layer_norm,
    "Conv1d": partial(convolution, 1, False),
    "Conv2d": partial(convolution, 2, False),
    "Conv3d": partial(convolution, 3, False),
    "Conv3dLayer": partial(convolution, 3, False),
    "ConvTranspose1d": partial(convolution, 1, True),
    "ModuleList": module_list,
    "Sequential": lambda *parts: module_list(parts),
    "Parameter": parameter,
    "make_layers": make_layers,
}


def read(owner: Any, name: str, *default: Any) -> Any:
    """getattr(); a section without the key has the default."""
    if isinstance(owner, Config):
        return getattr(owner, name) if name in owner.values or not default else default[0]
    return getattr(owner, name, *default)


def has(owner: Any, name: str) -> bool:
    """hasattr()"""
    return name in owner.values if isinstance(owner, Config) else hasattr(owner, name)


class Layers:
    """torch.nn: its layers by name; everything else is unknown."""

    def __getattr__(self, name: str) -> Any:
        return LAYERS.get(name, UNKNOWN)


NN = Layers()
KNOWN: dict[str, Any] = {
    **{name: getattr(builtins, name) for name in SAFE},
    **LAYERS,
    "getattr": read,
    "hasattr": has,
    "partial": partial,
    "nn": NN,
    "torch": SimpleNamespace(nn=NN, zeros=size, ones=size, empty=size),
    "dist_utils": SimpleNamespace(divide=lambda a, b: a // b),
    "get_tensor_model_parallel_world_size": lambda: 1,
}


class Module:
    """A file of a source tree: its classes, imports and constants."""

    def __init__(self, sources: "Sources", name: str, path: Path):
        self.sources = sources
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.classes: dict[str, ast.ClassDef] = {}
        self.imports: dict[str, tuple[str, str]] = {}
        self.constants: dict[str, ast.expr] = {}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                self._add_import(node)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node.value

    def _add_import(self, node: ast.ImportFrom) -> None:
        parents = self.package.split(".")
        parents = parents[: len(parents) - node.level + 1] if node.level else []
        module = ".".join([*parents, *filter(None, [node.module])])
        for alias in node.names:
            self.imports[alias.asname or alias.name] = (module, alias.name)

    def find(self, name: str) -> Any:
        """What a name stands for in this file: known, a class of the trees, a constant, unknown."""
        module, original = self.imports.get(name, ("", name))
        for known in (name, original):
            if known in self.sources.known:
                return self.sources.known[known]
        if name in self.classes:
            return Class(self, self.classes[name])
        if name in self.constants:
            return self.evaluate(self.constants[name], {})
        target = self.sources.module(module)
        return target.find(original) if target else UNKNOWN

    def evaluate(self, expression: ast.expr | None, local: dict[str, Any]) -> Any:
        """The value of an expression; UNKNOWN if it cannot be computed."""
        if expression is None:
            return UNKNOWN
        names = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        scope = {name: local[name] if name in local else self.find(name) for name in names}
        code = compile(ast.fix_missing_locations(ast.Expression(expression)), "<source>", "eval")
        try:
            return eval(code, {"__builtins__": {}, **scope})
        except Exception:  # a constructor of something that has no parameters
            return UNKNOWN


class Class:
    """A class of a source tree. Calling it follows its constructor and gives a Part."""

    def __init__(self, module: Module, node: ast.ClassDef):
        self.module = module
        self.node = node
        self.name = node.name

    def __call__(self, *arguments: Any, **named: Any) -> Part:
        part = Part(self)
        self.run("__init__", part, *arguments, **named)
        return part

    _from_config = __call__  # transformers: a model from its config

    def methods(self) -> set[str]:
        """Names of the methods of the class itself."""
        return {node.name for node in self.node.body if isinstance(node, ast.FunctionDef)}

    def method(self, name: str) -> tuple[Module, ast.FunctionDef] | None:
        """A method of the class or of its first base that has one, and the file it is in."""
        for node in self.node.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return self.module, node
        for base in self.node.bases:
            found = self.module.find(base.id) if isinstance(base, ast.Name) else None
            if isinstance(found, Class) and (method := found.method(name)):
                return method
        return None

    def constant(self, name: str) -> Any:
        """An attribute that the class body assigns."""
        for node in self.node.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
                return self.module.evaluate(node.value, {})
        return UNKNOWN

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.constant(name)

    def run(self, name: str, part: Part, *arguments: Any, **named: Any) -> dict[str, Any]:
        """Follow a method's statements -> its local variables at the end, with "return"."""
        found = self.method(name)
        if not found:
            return {"return": UNKNOWN}
        module, node = found
        names = [argument.arg for argument in [*node.args.posonlyargs, *node.args.args]]
        by_keyword = [argument.arg for argument in node.args.kwonlyargs]
        local: dict[str, Any] = dict.fromkeys([*names, *by_keyword, "return"], UNKNOWN)
        defaults = zip(reversed(names), reversed(node.args.defaults))
        for argument, default in [*defaults, *zip(by_keyword, node.args.kw_defaults)]:
            if default is not None:
                local[argument] = module.evaluate(default, {})
        local.update(zip(names, [part, *arguments]))
        local.update(named)
        follow(module, node.body, local, part)
        return local


def follow(module: Module, body: list[ast.stmt], local: dict[str, Any], part: Part) -> None:
    """Execute statements; those that make no parameters (raise, assert, import) are passed over."""
    for node in body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = module.evaluate(node.value, local)
            for target in targets:
                assign(target, value, local, part)
        elif isinstance(node, ast.Expr):
            module.evaluate(node.value, local)
        elif isinstance(node, ast.Return):
            local["return"] = module.evaluate(node.value, local)
        elif isinstance(node, ast.If):
            chosen = node.body if module.evaluate(node.test, local) else node.orelse
            follow(module, chosen, local, part)
        elif isinstance(node, ast.For):
            items = module.evaluate(node.iter, local)
            for item in [] if isinstance(items, Unknown) else items:
                assign(node.target, item, local, part)
                follow(module, node.body, local, part)
        elif isinstance(node, (ast.With, ast.Try)):
            follow(module, node.body, local, part)


def assign(target: ast.expr, value: Any, local: dict[str, Any], part: Part) -> None:
    """target = value, for names, attributes of self, and tuples of them."""
    if isinstance(target, ast.Name):
        local[target.id] = value
    elif isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
        part.put(target.attr, value)
    elif isinstance(target, ast.Tuple):
        values = [UNKNOWN] * len(target.elts) if isinstance(value, Unknown) else value
        for each, one in zip(target.elts, values):
            assign(each, one, local, part)


class Sources:
    """Source trees by the name of their package, and what certain names in them stand for."""

    def __init__(self, trees: dict[str, Path], **known: Any):
        self.trees = trees
        self.known = {**KNOWN, **known}
        self.module = cache(self._module)

    def _module(self, name: str) -> Module | None:
        """A file by its dotted name; None outside the trees."""
        package, *rest = name.split(".")
        if package not in self.trees:
            return None
        base = self.trees[package].joinpath(*rest)
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return Module(self, name, path)
        return None

    def find(self, module: str, name: str) -> Any:
        """A class or constant of a file. Raises SystemExit if the file is not there."""
        found = self.module(module)
        if found is None:
            raise SystemExit(f"{module} is not in the source; give a version that has it")
        return found.find(name)
