"""Does vllm-omni find in a model folder what its loader asks for?

    python tests/compare_vllm_omni.py FOLDER [--source DIR] [--facts FILE]

FOLDER is a model folder, as `minomni merge` and `minomni.save` write it, or qwen7b for the tensors
of the release's size without a file. DIR holds the packages
vllm, vllm_omni and perhaps transformers, unpacked and not installed. Without --source, the wheels
of VERSIONS are downloaded by pip into a temporary folder (320 MB) and unpacked. None of their code
is imported: tests/constructors.py reads which parameters their constructors make for the folder's
config.json, and their loaders tell how stored names become names of parameters. The report names
the stored tensors that no loader takes, parameters that nothing fills, and shapes that differ; the
exit status is 1 if there are any. --facts writes the names and shapes that were asked for, as
tests/golden/vllm_omni_names.json has them for the release's sizes.
"""

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from constructors import Class, Config, Parameter, Part, Sources
from safetensors import safe_open

from minomni.checkpoint.random_checkpoint import release_json, release_tensors
from minomni.config import QWEN7B

VERSIONS = {"vllm": "0.30.0", "vllm-omni": "0.30.0"}  # read on 2026-11-30
VLLM = "vllm.model_executor.models"
VLLM_OMNI = "vllm_omni.model_executor.models"
PIPELINE = f"{VLLM_OMNI}.qwen2_5_omni.pipeline"
CONFIGURATION = "transformers.models.qwen2_5_omni.configuration_qwen2_5_omni"
ROOT_CLASS = "Qwen2_5OmniForConditionalGeneration"
VLLM_CLASS = "Qwen2_5OmniModel"  # the architecture that the release's config.json names
STAGES = {"thinker": "thinker", "talker": "talker", "code2wav": "token2wav"}  # stage -> its part
QWEN7B_NAME = "qwen7b"
SHOWN = 5  # names of each finding in the report
Stored = dict[str, tuple[int, ...]]  # name of a stored tensor -> its shape


@dataclass
class Mapper:
    """vLLM's WeightsMapper: rules that turn the name of a stored tensor into a parameter's."""

    orig_to_new_regex: dict = field(default_factory=dict)
    orig_to_new_substr: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_stacked: dict[str, tuple[str, str | int]] = field(default_factory=dict)
    orig_to_new_prefix: dict[str, str | None] = field(default_factory=dict)
    orig_to_new_suffix: dict[str, str | None] = field(default_factory=dict)
    params_mapping: dict[str, tuple[str, str | int]] = field(default_factory=dict)  # a loop's rules

    def __or__(self, other: "Mapper") -> "Mapper":
        names = [each.name for each in fields(self)]
        return Mapper(*({**getattr(self, name), **getattr(other, name)} for name in names))

    def apply(self, name: str) -> tuple[str, str | int | None] | None:
        """A name -> the new one and the shard that it fills, if any; None if it is left out."""
        if self.orig_to_new_regex or self.orig_to_new_suffix:
            raise SystemExit("a rule by pattern or suffix is new in the source; add it to apply()")
        shard = None
        for old, new in self.orig_to_new_substr.items():
            if old in name and new is None:
                return None
            name = name.replace(old, new or "", 1) if old in name else name
        for old, (new_name, new_shard) in self.orig_to_new_stacked.items():
            if old in name:
                name, shard = name.replace(old, new_name, 1), new_shard
        for old, (new_name, new_shard) in self.params_mapping.items():
            if old in name:
                name, shard = name.replace(old, new_name), new_shard
                break  # as the loop: v_proj is a part of qkv_proj, too
        for old, new in self.orig_to_new_prefix.items():
            if name.startswith(old) and new is None:
                return None
            name = name.replace(old, new or "", 1) if name.startswith(old) else name
        return name, shard


class Loader:
    """Stands for vLLM's AutoWeightsLoader: gives the rules that it is called with."""

    def __init__(self, module: Any, **_: Any):
        pass

    def load_weights(self, weights: Any, mapper: Mapper | None = None) -> Mapper:
        return mapper or Mapper()


@dataclass
class Findings:
    """What became of the stored tensors of a folder, and of the parameters."""

    stored: Stored
    taken: dict[str, tuple[Parameter, str | int | None]] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)  # by a rule of a loader, without an error
    refused: set[str] = field(default_factory=set)  # the loader ends with an error
    unfilled: set[str] = field(default_factory=set)  # parameters that keep their random numbers
    warnings: list[str] = field(default_factory=list)

    def other_shapes(self) -> list[str]:
        """The taken tensors whose shape is not that of the parameter or shard."""
        found = []
        for name, (parameter, shard) in self.taken.items():
            wanted = parameter.shape if shard is None else parameter.shards.get(shard)
            if wanted is not None and wanted != self.stored[name]:
                found.append(f"{name} {list(self.stored[name])}, asked for {list(wanted)}")
        return found

    def without_shape(self) -> int:
        """Taken tensors whose shape the source does not tell."""
        return sum(
            (parameter.shape if shard is None else parameter.shards.get(shard)) is None
            for parameter, shard in self.taken.values()
        )

    def problems(self) -> dict[str, list[str]]:
        return {
            "stored, and an error in the loader": sorted(self.refused),
            "stored, and taken by no loader": sorted(self.left_out),
            "asked for, and not stored": sorted(self.unfilled),
            "of another shape": self.other_shapes(),
        }


class VllmOmni:
    """The constructors and loaders of vllm-omni's three stages, read from source trees."""

    def __init__(self, trees: dict[str, Path]):
        self.sources = Sources(
            trees,
            WeightsMapper=Mapper,
            AutoWeightsLoader=Loader,
            init_vllm_registered_model=self._registered,
            set=set,
        )
        self.classes = self._registry()
        self.root = self._class(ROOT_CLASS)
        utilities = self.sources.module(f"{VLLM}.utils")
        loader = Class(utilities, utilities.classes["AutoWeightsLoader"])
        self.always = loader.constant("REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER")
        self.ignored = ignored_suffixes(loader.node)
        if not isinstance(self.always, Mapper) or not self.ignored:
            raise SystemExit("AutoWeightsLoader has changed; read it and adapt this script")

    def _registry(self) -> dict[str, str]:
        """Architecture -> dotted name of its class. vllm-omni's entries name a folder besides."""
        found: dict[str, str] = {}
        for package, length in ((VLLM, 2), (VLLM_OMNI, 3)):
            registry = self.sources.module(f"{package}.registry")
            for name in registry.constants if registry else ():
                table = registry.find(name)
                for architecture, place in table.items() if isinstance(table, dict) else ():
                    if isinstance(place, tuple) and len(place) == length:
                        found[architecture] = ".".join([package, *place])
        return found

    def _class(self, architecture: str) -> Class:
        module, _, name = self.classes.get(architecture, "").rpartition(".")
        return self.sources.find(module, name)

    def _registered(
        self, vllm_config: Config, hf_config: Any = None, architectures: Any = (), **_: Any
    ) -> Part:
        settings = {**vllm_config.values["model_config"].values}
        settings["hf_config"] = hf_config or settings["hf_config"]
        chosen = self._class(architectures[0])
        constructor = chosen.method("__init__")
        if constructor and "vllm_config" not in ast.unparse(constructor[1].args):
            return chosen(config=settings["hf_config"])  # a model in the style of transformers
        return chosen(vllm_config=Config({**vllm_config.values, "model_config": Config(settings)}))

    def stage(self, name: str, config: dict[str, Any]) -> Part:
        """The model of one process of the server."""
        settings = Config({"hf_config": Config(config), "model_stage": name})
        return self.root(vllm_config=Config({"model_config": settings, "quant_config": None}))

    def with_defaults(self, section: dict[str, Any]) -> dict[str, Any]:
        """A section of config.json and those in it, with the defaults of transformers' classes."""
        module = self.sources.module(CONFIGURATION)
        values: dict[str, Any] = {}
        for name in module.classes if module else ():
            made = Class(module, module.classes[name])
            if made.constant("model_type") == section.get("model_type", ""):
                values = {
                    node.target.id: module.evaluate(node.value, {})
                    for node in made.node.body
                    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
                }
        values.update(section)
        return {
            key: self.with_defaults(value) if isinstance(value, dict) else value
            for key, value in values.items()
        }

    def prefixes(self) -> list[str]:
        """First parts of the names that the root loader takes; any other is an error."""
        _, method = self.root.method("load_weights")
        return sorted(constants_of_calls(method, "startswith"))

    def rules(self, part: Part) -> Mapper | None:
        """The rules of a part's own load_weights; None if it has none."""
        if part.source is None or part.source.method("load_weights") is None:
            return None
        local = part.source.run("load_weights", part, ())
        mappers = [value for value in local.values() if isinstance(value, Mapper)]
        stacked = local.get("stacked_params_mapping", [])
        own = Mapper(params_mapping={old: (new, shard) for new, old, shard in stacked})
        return (mappers[0] if mappers else Mapper()) | own | self.always

    def load(self, part: Part, weights: list["Weight"], findings: Findings) -> None:
        """Hand stored tensors to a part, as its loader does."""
        rules = self.rules(part) or Mapper()
        below: dict[str, list[Weight]] = {}
        for weight in weights:
            renamed = rules.apply(weight.name)
            if renamed is None:
                findings.left_out.add(weight.stored)
                continue
            first, _, rest = renamed[0].partition(".")
            shard = weight.shard if renamed[1] is None else renamed[1]
            below.setdefault(first, []).append(Weight(rest, weight.stored, shard))
        for first, group in below.items():
            if first in part.children:
                self.load(part.children[first], group, findings)
                continue
            for weight in group:
                if first in part.parameters:
                    findings.taken[weight.stored] = (part.parameters[first], weight.shard)
                elif first in part.buffers:
                    findings.taken[weight.stored] = (Parameter(None), None)
                elif weight.stored.endswith(tuple(self.ignored)):
                    findings.left_out.add(weight.stored)
                else:
                    findings.refused.add(weight.stored)

    def compare(self, stored: Stored, config: dict[str, Any]) -> Findings:
        """Load the names of a folder into the parts of all stages."""
        findings = Findings(stored)
        prefixes = tuple(self.prefixes())
        findings.refused.update(name for name in stored if not name.startswith(prefixes))
        pipeline = self.sources.module(PIPELINE).constants["QWEN2_5_OMNI_PIPELINE"]
        model_types = [each.value for each in pipeline.keywords if each.arg == "model_type"]
        if config.get("model_type") not in [each.value for each in model_types]:
            findings.warnings.append(f"no stages for the model_type {config.get('model_type')!r}")
        config = self.with_defaults(config)
        for stage, attribute in STAGES.items():
            model = self.stage(stage, config)
            part = model.children.get(attribute)
            if part is None or not part.tensors():
                raise SystemExit(f"the constructor of stage {stage} was not understood")
            names = [name for name in stored if name.startswith(f"{attribute}.")]
            self.load(part, [Weight(name, name, None) for name in names], findings)
            findings.unfilled |= unfilled(part, f"{attribute}.", findings)
            if stage == "talker":
                self._check_speech(model, stored, config, findings)
        return findings

    def compare_thinker(self, stored: Stored, config: dict[str, Any]) -> Findings:
        """Load a folder as vllm does without vllm-omni: the Thinker alone."""
        findings = Findings(stored)
        settings = Config({"hf_config": Config(self.with_defaults(config))})
        thinker = self._class(VLLM_CLASS)(
            vllm_config=Config({"model_config": settings, "quant_config": None})
        )
        self.load(thinker, [Weight(name, name, None) for name in stored], findings)
        findings.unfilled |= unfilled(thinker, "", findings)
        parts = ("talker.", "token2wav.")  # left out by a rule, since it only writes text
        findings.left_out = {name for name in findings.left_out if not name.startswith(parts)}
        return findings

    def _check_speech(
        self, model: Part, stored: Stored, config: dict[str, Any], findings: Findings
    ) -> None:
        """What the code of the Talker's stage has in it, and not from config.json."""
        _, method = self.root.method("load_weights")
        for name in equal_constants(method):
            if name not in stored:
                findings.unfilled.add(f"{name} (for the Talker)")
        end = self.root.module.find("TALKER_CODEC_EOS_TOKEN_ID")
        if end != (own := config["talker_config"]["tts_codec_end_token_id"]):
            findings.warnings.append(
                f"speech does not end: the code stops at the id {end}, the folder's is {own}"
            )
        voices = model.values.get("tts_text_spk_token_ids", {})
        rows = config["thinker_config"]["text_config"]["vocab_size"]
        outside = [voice for voice, row in voices.items() if row >= rows]
        if outside or not voices:
            findings.warnings.append(
                f"no speech: the rows of the voices {outside} are outside the {rows} embeddings"
            )


@dataclass
class Weight:
    """A stored tensor on its way through the loaders."""

    name: str  # below the current part
    stored: str
    shard: str | int | None


def unfilled(part: Part, prefix: str, findings: Findings) -> set[str]:
    """Parameters of a part that no stored tensor fills, or only some of its shards."""
    filled = {(id(parameter), shard) for parameter, shard in findings.taken.values()}
    return {
        name
        for name, parameter in part.tensors(prefix).items()
        if not {(id(parameter), shard) for shard in parameter.shards or [None]} <= filled
    }


def constants_of_calls(method: ast.AST, name: str) -> set[str]:
    """The texts that a method's calls of something.name(...) are given."""
    calls = [
        node
        for node in ast.walk(method)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
    ]
    found = [argument for call in calls for argument in call.args]
    return {each.value for each in found if isinstance(each, ast.Constant)}


def ignored_suffixes(loader: ast.AST) -> set[str]:
    """Ends of names that AutoWeightsLoader passes over where no parameter has them."""
    return {text for text in constants_of_calls(loader, "append") if text.startswith(".")}


def equal_constants(method: ast.AST) -> set[str]:
    """Names of single tensors that a loader looks for by n == "..."."""
    found = set()
    for node in ast.walk(method):
        if isinstance(node, ast.Compare) and isinstance(node.comparators[0], ast.Constant):
            value = node.comparators[0].value
            if isinstance(value, str) and value.endswith(".weight"):
                found.add(value)
    return found


def stored_tensors(folder: Path) -> Stored:
    """The tensors of the safetensors files on the top level of a folder: those that vLLM opens."""
    found: Stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def release_size() -> tuple[Stored, dict[str, Any]]:
    """Tensors and config.json of the 7B, as `minomni make-checkpoint qwen7b` would write them."""
    tensors = release_tensors(QWEN7B)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}, release_json(QWEN7B)


def names_and_shapes(stored: Stored) -> dict[str, list[list[int]]]:
    """Names with * for every number -> the different shapes of these tensors."""
    found: dict[str, set[tuple[int, ...]]] = {}
    for name, shape in stored.items():
        found.setdefault(pattern(name), set()).add(shape)
    return {name: [list(shape) for shape in sorted(found[name])] for name in sorted(found)}


def facts(stored: Stored) -> str:
    """JSON of the versions, and of the names and shapes that all loaders take, a name a line."""
    names = [f"{json.dumps(key)}: {value}" for key, value in names_and_shapes(stored).items()]
    listed = ",\n".join(names)
    return f'{{"versions": {json.dumps(VERSIONS)}, "names": {{\n{listed}\n}}}}\n'


def pattern(name: str) -> str:
    """The name of a tensor without the number of its layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def trees(source: Path) -> dict[str, Path]:
    """The packages below a folder of sources; transformers may be an installed one."""
    found = {}
    for package in ("vllm", "vllm_omni", "transformers"):
        places = (source / package, source / "src" / package, source / package.replace("_", "-"))
        inner = [place / package for place in places]
        for place in (*inner, *places):
            if (place / "__init__.py").is_file():
                found.setdefault(package, place)
    installed = importlib.util.find_spec("transformers")
    if installed and installed.origin:
        found.setdefault("transformers", Path(installed.origin).parent)
    missing = {"vllm", "vllm_omni", "transformers"} - found.keys()
    if missing:
        raise SystemExit(f"{source} has no {', '.join(sorted(missing))}; unpack the wheels there")
    return found


def download(folder: Path) -> None:
    """The wheels of VERSIONS by pip, unpacked and not installed."""
    names = [f"{name}=={version}" for name, version in VERSIONS.items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--only-binary", ":all:", "--dest", str(folder), *names], check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder, [name for name in file.namelist() if name.endswith(".py")])


def report(findings: Findings) -> str:
    """The findings, a few names of each."""
    lines = [
        f"{len(findings.stored)} tensors are stored, {len(findings.taken)} are taken; "
        f"of {findings.without_shape()} the shape is not known from the source"
    ]
    for title, names in findings.problems().items():
        lines.append(f"{title}: {len(names)}")
        lines += [f"    {name}" for name in names[:SHOWN]]
        lines += ["    ..."] if len(names) > SHOWN else []
    lines += [f"warning: {warning}" for warning in findings.warnings]
    return "\n".join(lines)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a model folder, or qwen7b")
    parser.add_argument("--source", type=Path, help="folder with the packages vllm and vllm_omni")
    parser.add_argument("--facts", type=Path, help="write the names and shapes to this file")
    given = parser.parse_args(None if arguments is None else list(arguments))
    if str(given.folder) == QWEN7B_NAME:
        stored, config = release_size()
    else:
        stored = stored_tensors(given.folder)
        config = json.loads((given.folder / "config.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        if given.source is None:
            download(Path(temporary))
        reader = VllmOmni(trees(given.source or Path(temporary)))
        findings = {
            "vllm-omni": reader.compare(stored, config),
            "vllm alone, which reads the Thinker": reader.compare_thinker(stored, config),
        }
    for title, each in findings.items():
        print(f"{title}: {report(each)}")
    problems = any(any(each.problems().values()) for each in findings.values())
    if given.facts and not problems:
        given.facts.write_text(facts(stored), encoding="utf-8")
    return int(problems)


if __name__ == "__main__":
    sys.exit(main())
