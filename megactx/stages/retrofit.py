"""Give a pretrained model MegaContext: GistNet, LensNet, their reports, and one folder with a model card.

    python -m megactx.stages.retrofit BASE TEXTS OUT [preset=smoke|demo|full] [lora=RANK] [KEY=VALUE] [gist:KEY=VALUE]
    python -m megactx.apps.serve MEMORIES --model OUT

BASE is what base.name of train.py may be: a folder, a GGUF file, asset:NAME, or a name on a hub. Each step is a run of
``train.py`` with a folder of its own in OUT.retrofit, where its log is too: experiment=retrofit_gist and
retrofit_lens, or what ``gist:experiment=...`` says. A setting reaches all, or the one that it names. The same command
goes on after a kill. With lora=RANK another step, retrofit_lora, trains adapters on the base LM that read windows of
gists; without it the base LM stays as it is. Keys of blocks are the last that is trained: keys=STEPS, 0 for none, or
keys=FOLDER of what megactx.studies.keys has made for BASE.

smoke is a look in a minute, demo is meant for an hour of SmolLM2 on two plain cores, full for days of a GPU. Where
preset.minutes cuts the steps of the GistNet, the later steps have the same share of their windows and documents.
"""

import argparse
import contextlib
import io
import json
import re
import shlex
import sys
import time
from pathlib import Path

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from megactx.framework import app, files
from megactx.framework.bar import quiet_libraries
from megactx.framework.command_line import run
from megactx.framework.config.search_path import compose
from megactx.framework.config.validate import locate
from megactx.framework.errors import DONE, INTERRUPTED
from megactx.framework.lock import Lock
from megactx.framework.run.fit import other_content
from megactx.framework.run.pace import by_hand
from megactx.lm import BaseLM
from megactx.parts.find import KEYS

from .export import export, refuse_other
from .joint_report import in_words
from .keys import texts, train_keys
from .prefills import composed

TITLES = {"gist": "GistNet", "lens": "LensNet", "lora": "LoRA", "keys": "keys", "export": "export"}
RANKS = range(4, 17)  # of adapters
PRESETS = {  # step -> settings that come before a person's own
    "smoke": {
        "gist": ["preset=demo", "debug=limit", "preset.batch=2", "preset.spans=4", "preset.min_tokens=256"],
        "lens": [
            *("preset=demo", "debug=limit", "stage.budgets=[0.5]", "stage.evaluate.budgets=[0.5]"),
            *("stage.evaluate.tokens=512", "datamodule.min_tokens=512", "datamodule.max_tokens=640"),
            *("datamodule.validation_windows=2", "datamodule.batch=2"),
        ],
        "lora": [
            *("preset=demo", "preset.alternating.lora=4", "preset.alternating.validate_every=2", "preset.warmup=1"),
            *("stage.budgets=[0.5]", "stage.evaluate.budgets=[0.5]", "stage.evaluate.tokens=512"),
            *("datamodule.min_tokens=512", "datamodule.max_tokens=640", "datamodule.validation_windows=2"),
        ],
    },
    "demo": {"gist": [], "lens": [], "lora": []},
    "full": {step: ["preset=full", "preset.minutes=null"] for step in ("gist", "lens", "lora")},
}
# What a step has a share of, where time has cut the steps of the GistNet on this machine, and the least of it.
SHARED = {
    "lens": {"preset.steps": 30, "preset.lens.windows": 8, "preset.report.documents": 6},
    "lora": {"preset.alternating.lora": 20, "preset.alternating.report": 4},
}
STEPS_OF_KEYS = {"smoke": 4, "demo": 400, "full": 4000}
DOCUMENTS_OF_KEYS, TOKENS_OF_KEYS = 300, 4096  # at most
EVERY = 30.0  # seconds between two lines where there is no terminal
MEMORY = re.compile(r"^Memory of a step.*$", re.MULTILINE)


class Retrofit:
    """A retrofit that is begun, or gone on with.

    Args:
        base, texts: see above.
        out: folder of the export; the runs are beside it.
        overrides: of all steps, or ``STEP:KEY=VALUE`` of one; ``preset=``, ``keys=`` and ``lora=`` may be among them.

    Raises:
        ValueError: a preset or a step that is not known, or a folder that holds something else.
    """

    def __init__(self, base: str, texts: str, out: Path, overrides: list[str]):
        self.out, self.work = out, out.with_name(f"{out.name}.retrofit")
        refuse_other(out)
        presets = [o.partition("=")[2] for o in overrides if o.startswith("preset=")] or ["demo"]
        self.preset = presets[-1]
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset} is not allowed: {', '.join(PRESETS)}")
        self.keys, self.steps_of_keys = self._keys([o.partition("=")[2] for o in overrides if o.startswith("keys=")])
        rank = ([o.partition("=")[2] for o in overrides if o.startswith("lora=")] or ["0"])[-1]
        if not (rank.isdecimal() and (int(rank) == 0 or int(rank) in RANKS)):
            raise ValueError(f"lora={rank} is not allowed: a rank from 4 to 16, or 0 for no adapters")
        self.steps, self.rank = ("gist", "lens") + ("lora",) * (int(rank) > 0), int(rank)
        overrides = [o for o in overrides if not o.startswith(("preset=", "keys=", "lora="))]
        for override in overrides:
            step, colon, _ = override.partition("=")[0].partition(":")
            if colon and step not in self.steps:
                raise ValueError(f"{override}: there is no step {step}; allowed are {', '.join(self.steps)}")
            if override.removeprefix(f"{step}:").startswith(("folder=", "resume=")):
                raise ValueError(f"{override} is not allowed: the runs lie in {self.work}, and go on by themselves")
        self.commands = {step: self._command(step, base, texts, overrides) for step in self.steps}
        self.base, self.texts, self.about_keys = base, texts, ""

    def _keys(self, given: list[str]) -> tuple[Path | None, int]:
        """-> folder of keys that are there, and steps of training where there are none."""
        wanted = given[-1] if given else str(STEPS_OF_KEYS[self.preset])
        if wanted.isdecimal():
            return None, int(wanted)
        folder = Path(wanted).expanduser().absolute()
        if not (folder / KEYS).is_file():
            raise ValueError(
                f"keys={wanted} is not allowed: steps of training, a whole number from 0, which is for none; or a"
                " folder of keys, made by python -m megactx.studies.keys"
            )
        return folder, 0

    def _command(self, step: str, base: str, texts: str, overrides: list[str]) -> list[str]:
        own = [o.removeprefix(f"{step}:") for o in overrides if o.startswith(f"{step}:") or ":" not in o.split("=")[0]]
        experiment = [o for o in own if o.startswith("experiment=")] or [f"experiment=retrofit_{step}"]
        about = [f"base.name={_quoted(base)}", f"data.path={_quoted(texts)}"]
        about += [f"stage.gistnet={_quoted(str(self.work / 'gist'))}"] if step in ("lens", "lora") else []
        about += [f"stage.lens={_quoted(str(self.work / 'lens'))}", f"stage.lora.rank={self.rank}"] * (step == "lora")
        rest = [o for o in own if not o.startswith("experiment=")]
        folder = f"folder={_quoted(str(self.work / step))}"
        return [*experiment, *PRESETS[self.preset][step], *about, *rest, folder]

    def run(self) -> int:
        """Make what is not there yet; -> exit code.

        Raises:
            ValueError: it was begun with other settings.
            RunFailed: the disk is full.
        """
        busy = f"{self.work} is in use by process {{holder}}: that one makes {self.out}"
        made = [folder for folder in (self.work, *self.work.parents) if not folder.exists()]
        with Lock(self.work / "lock", busy):
            try:
                self._same()
                self._check()
                files.write(self.work / "retrofit.json", json.dumps(self.commands, indent=1) + "\n")
            except BaseException:
                if made:  # nothing was trained there, and nobody else has put anything there
                    with contextlib.suppress(OSError):
                        (self.work / "lock").unlink()
                        for folder in made:
                            folder.rmdir()
                raise
            for number, step in enumerate(self.steps, 1):
                if not (self.work / step / "done").exists() and (code := self._train(step, number)) != DONE:
                    return code
            quiet_libraries()
            self._train_keys()
            with _Line(self._place(self.parts), TITLES["export"]):
                export(self.work / self.steps[-1], self.out, self._card(), self.keys)
        if self.steps_of_keys and self.keys is None:
            print(f"keys of blocks: {self.about_keys}")
        print(f"{self.out}: python -m megactx.apps.chat --model {shlex.quote(str(self.out))}")
        return DONE

    def _same(self) -> None:
        """What is done already must be what is wanted; of a run that is under way ``train.py`` sees to that."""
        place = self.work / "retrofit.json"
        before = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {}
        for step, command in self.commands.items():
            then = before.get(step, command)
            if then != command and (self.work / step / "done").exists():
                gone = " ".join(o for o in then if o not in command) or "nothing"
                new = " ".join(o for o in command if o not in then) or "nothing"
                raise ValueError(
                    f"{self.work / step} was made with other settings: {gone} is now {new}. Remove it first"
                )
            if (self.work / step / "done").exists() and (
                changes := other_content(compose(self._paced(step)), self.work / step)
            ):
                raise ValueError(f"{self.work / step} was made of other things: {'; '.join(changes)}. Remove it first")

    def _check(self) -> None:
        """What a later step would refuse is refused now, and not after the training of those before it."""
        for step in self.steps:
            if (self.work / step / "done").exists():
                continue
            cfg, _ = composed(self.commands[step])
            base = BaseLM.from_pretrained(cfg.base.name, cfg.base.dtype)
            try:
                datamodule = instantiate(cfg.datamodule, _convert_="all")
                datamodule.limit_to(base.max_positions)
                datamodule.setup("fit")
                locate(cfg.stage["_target_"]).check_lengths(OmegaConf.to_container(cfg.stage, resolve=True), datamodule)
            except InstantiationException as error:
                raise ValueError(f"{TITLES[step]}: {error.__cause__ or error}") from error
            except ValueError as error:
                raise ValueError(f"{TITLES[step]}: {error}") from error

    def _train(self, step: str, number: int) -> int:
        log = self.work / f"{step}.log"
        with log.open("a", encoding="utf-8") as kept, _Line(self._place(number), TITLES[step], kept) as line:
            with contextlib.redirect_stdout(line), contextlib.redirect_stderr(line):
                code = app.run([*self._paced(step), "resume=auto"])
        if code not in (DONE, INTERRUPTED):
            told = [said for said in log.read_text(encoding="utf-8").splitlines() if said.startswith("megactx")]
            print(f"{told[-1] if told else 'megactx: it failed'} (all of it is in {log})", file=sys.stderr)
        elif code == INTERRUPTED:
            print("\nmegactx: interrupted; the same command goes on", file=sys.stderr)
        return code

    def _paced(self, step: str) -> list[str]:
        """The command of a step, with the share of its lengths that ``preset.minutes`` left of the GistNet's steps."""
        command, kept = self.commands[step], self.work / "gist" / "config.yaml"
        if step not in SHARED or not kept.is_file():
            return command
        share = OmegaConf.load(kept).preset.steps / compose(self.commands["gist"]).preset.steps
        if share >= 1:
            return command
        given, cfg = by_hand(command), compose(command)
        lengths = {key: (OmegaConf.select(cfg, key), least) for key, least in SHARED[step].items() if key not in given}
        return [
            *command,
            *(f"{key}={min(most, max(least, round(share * most)))}" for key, (most, least) in lengths.items()),
        ]

    def _place(self, number: int) -> str:
        return f"{number} of {self.parts}"

    @property
    def parts(self) -> int:
        return len(self.steps) + bool(self.steps_of_keys) + 1

    def _train_keys(self) -> None:
        """Keys of the texts; where there is too little of them it says so and goes on."""
        if not self.steps_of_keys:
            return
        made, about = self.work / "keys", {"base": self.base, "texts": self.texts, "steps": self.steps_of_keys}
        with (self.work / "keys.log").open("a", encoding="utf-8") as kept:
            with _Line(self._place(self.parts - 1), TITLES["keys"], kept) as line, contextlib.redirect_stdout(line):
                place = self.work / "keys_of.json"
                if not (made / KEYS).is_file() or not place.is_file() or json.loads(place.read_text()) != about:
                    base = BaseLM.from_pretrained(self.base, "float32").freeze()
                    try:
                        learned, _ = texts(base.tokenizer, self.texts, DOCUMENTS_OF_KEYS, TOKENS_OF_KEYS)
                    except ValueError as error:
                        self.about_keys = f"It has none: {str(error).removeprefix('--path: ')}"
                        return
                    losses = train_keys(base, learned, made, self.steps_of_keys)
                    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f}")
                    files.write(place, json.dumps(about) + "\n")
        self.keys, self.about_keys = made, json.loads((made / KEYS).read_text(encoding="utf-8"))["made_by"]

    def _card(self) -> str:
        """What it is, of what it was made, and what both reports say."""
        parts = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [megactx]", "---", ""]
        parts += [f"# {self.out.name}", "", f"`{self.base}` with MegaContext: a GistNet and a LensNet beside it.", ""]
        unchanged = "Its own weights are as they were, so without gists its answers and perplexity are too."
        changed = f"Adapters of rank {self.rank} are merged into its weights; its perplexity before and after is below."
        parts += [changed if self.rank else unchanged, ""]
        parts += ["    python -m megactx.apps.serve MEMORIES --model THIS", "", "## How it was made", ""]
        parts += [f"    python train.py {shlex.join(self._paced(step))}" for step in self.steps]
        for step in self.steps:
            memory = MEMORY.findall((self.work / f"{step}.log").read_text(encoding="utf-8"))
            parts += ["", f"## {TITLES[step]}", "", *memory[-1:], ""]
            if (plain := self.work / step / "base.json").exists():
                parts += [in_words(json.loads(plain.read_text(encoding="utf-8"))), ""]
            report = (self.work / step / "report.md").read_text(encoding="utf-8")
            parts += [re.sub(r"^(#+) ", r"##\1 ", report, flags=re.MULTILINE).strip()]
        if self.about_keys:
            parts += ["", f"## {TITLES['keys']}", "", f"{self.about_keys}."]
        return "\n".join(parts) + "\n"


class _Line(io.TextIOBase):
    """One line that says what is being done; all that is written to it goes to a log.

    Args:
        place: such as ``1 of 3``.
        kept: the log.
    """

    def __init__(self, place: str, what: str, kept: io.TextIOBase | None = None):
        self.place, self.what, self.kept, self.out = place, what, kept, sys.stdout
        self.began, self.told, self.last = time.monotonic(), -EVERY, ""

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        self.kept.write(text)
        self.kept.flush()
        if lines := [line for line in text.splitlines() if line.strip()]:
            self.last = lines[-1].strip()
            self._tell()
        return len(text)

    def _tell(self, end: bool = False) -> None:
        seconds = time.monotonic() - self.began
        line = f"{self.place}  {self.what}  {seconds:.0f} s"
        if self.out.isatty():
            print(
                f"\r\x1b[K{line}  {self.last[:80]}" if not end else f"\r\x1b[K{line}", end="", file=self.out, flush=True
            )
        elif end or seconds - self.told >= EVERY:
            self.told = seconds
            print(line if end else f"{line}  {self.last[:80]}", file=self.out, flush=True)

    def __enter__(self) -> "_Line":
        return self

    def __exit__(self, *exception) -> None:
        self._tell(end=True)
        if self.out.isatty():
            print(file=self.out)


def _quoted(value: str) -> str:
    """As a value of an override, whatever it holds."""
    return value if re.fullmatch(r"[\w./:-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _command(args: argparse.Namespace) -> int:
    texts = str(Path(args.texts).expanduser().absolute())
    base = Path(args.base).expanduser()
    name = str(base.absolute()) if base.exists() else args.base
    return Retrofit(name, texts, Path(args.out).expanduser().absolute(), args.overrides).run()


def main(arguments: list[str] | None = None) -> int:
    """The command line; -> exit code."""
    parser = argparse.ArgumentParser(prog="python -m megactx.stages.retrofit", description=__doc__.partition("\n")[0])
    parser.add_argument("base", metavar="BASE", help="a folder, a GGUF file, asset:NAME, or a name on a hub")
    parser.add_argument("texts", metavar="TEXTS", help="a file, a folder or a glob of text")
    parser.add_argument("out", metavar="OUT", help="folder to write; an export that is there is replaced")
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="preset=smoke|demo|full; lora=RANK; keys=FOLDER; of train.py"
    )
    return run(_command, parser, arguments)


if __name__ == "__main__":
    sys.exit(main())
