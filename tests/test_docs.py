"""The documents: nothing unfinished, no dead link, no command, flag, file or message that does not exist."""

import ast
import fnmatch
import functools
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from docs.docstrings import restructured
from docs.generated import pages
from epg_fast import config
from epg_fast.__main__ import _JOBS
from epg_fast.flags import explained, parse, parse_known

ROOT = Path(__file__).parents[1]
PAGES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
GENERATED = {f"docs/{name}": text for name, text in pages().items()}
PAGES = [name for name in PAGES if name not in GENERATED]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *PAGES]
TUNED = {name: job.configs[0] for name, job in _JOBS.items() if name.startswith(("pretrain", "finetune"))}
TUNED["sample"] = config.TunedSampleConfig
OTHERS_FLAGS = {
    "pip, uv": {"--force-reinstall", "--index-url", "--no-build-isolation", "--no-deps", "--sdist"},
    "torchrun": {
        "--max-restarts",
        "--nnodes",
        "--nproc-per-node",
        "--rdzv-endpoint",
        "--shutdown-timeout",
        "--signals-to-handle",
    },
    "docker, slurm, jupytext": {"--gpus-per-node", "--gpus-per-task", "--shm-size", "--signal", "--to"},
    "the command line itself": {"--help", "--version", "--name", "--batch-size"},
}


@functools.cache
def read(name):
    return GENERATED[name] if name in GENERATED else (ROOT / name).read_text(encoding="utf-8")


def fences(name):
    """(language, content) of each fenced block."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```", read(name), re.M | re.S)


def prose(name):
    return re.sub(r"^```.*?^```", "", read(name), flags=re.M | re.S)


def inline_code(name):
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(name))]


def command_lines(name):
    """Commands of bash blocks, continued lines joined, comments dropped."""
    for language, content in fences(name):
        if language == "bash":
            for line in re.sub(r"\\\n", " ", content).splitlines():
                if line.strip() and not line.startswith("#"):
                    yield line


def words_of_job(line):
    """Words behind `epg-fast` or `-m epg_fast`, [] if there are none of these."""
    found = re.search(r"(?:^|[\s'\"(])(?:epg-fast|-m(?: --)? epg_fast)\s(.*)", line)
    return shlex.split(re.sub(r"'\s*(\|\|.*)?$", "", found[1]), comments=True) if found else []


def check_command(words):
    """Parse as the command line does, without running anything. Raises ValueError."""
    job, *rest = words
    if job in ("--version", "--help", "JOB"):
        return
    if job not in _JOBS:
        raise ValueError(f"no job {job}")
    if "--help" in rest:
        return
    if job == "tune":
        options, others = parse_known(config.TuneConfig, rest)
        parse([TUNED[options.job]], others, "tune", network_only=options.job == "sample")
    else:
        parse(_JOBS[job].configs, rest, job)


@functools.cache
def anchors(name):
    """What links may name: headings as GitHub and MyST slug them."""
    text = re.sub(r"^```.*?^```", "", read(name), flags=re.M | re.S)
    headings = [re.sub(r"`|\[|\]\([^)]*\)", "", h) for h in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_lead_somewhere_and_nothing_is_left_open(name):
    assert "@@" not in read(name) and "TODO" not in read(name)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", prose(name)):
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent.joinpath(path).resolve().relative_to(ROOT).as_posix() if path else name
        assert file in GENERATED or (ROOT / file).exists(), target
        if anchor and file.endswith(".md"):
            assert anchor in anchors(file), f"{target}: {sorted(anchors(file))}"


def test_every_page_is_in_a_table_of_contents():
    patterns = [
        f"{Path(page).parent.as_posix()}/{line}.md"
        for page in PAGES
        for kind, content in fences(page)
        if kind.startswith("{toctree}")
        for line in content.split("\n")
        if line and not line.startswith(":")
    ]
    lost = [page for page in (*PAGES, *GENERATED) if not any(fnmatch.fnmatch(page, p) for p in patterns)]
    assert lost == ["docs/index.md"]


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_commands_parse_with_the_parser_of_the_command_line(name):
    lines = [*command_lines(name), *(code for code in inline_code(name) if "epg" in code)]
    for words in filter(None, map(words_of_job, lines)):
        check_command(words)


@pytest.mark.parametrize("words", ["sample --stepz 3", "evaluate --reference", "trian", "pretrain --config nowhere"])
def test_a_command_with_a_mistake_would_be_noticed(words):
    with pytest.raises(ValueError):
        check_command(words_of_job(f"torchrun -m epg_fast {words}  # so"))


def test_commands_are_found_wherever_they_stand():
    lines = ["epg-fast env", "torchrun -m -- epg_fast env", "srun bash -c 'exec python -m epg_fast env' || exit 1"]
    assert [words_of_job(line) for line in lines] == [["env"]] * 3
    assert sum(1 for line in command_lines("docs/long-runs.md") if words_of_job(line)) >= 2


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_flags_in_the_text_exist(name):
    known = {flag.partition(" ")[0] for job in _JOBS.values() for flag, *_ in explained(job.configs or ())}
    known |= {flag.partition(" ")[0] for flag, *_ in explained([config.TuneConfig])}.union(*OTHERS_FLAGS.values())
    sources = "".join(p.read_text() for p in [*(ROOT / "bench").rglob("*.py"), ROOT / "tools/size.py"])
    for code in inline_code(name):
        for flag in re.findall(r"(?:^|\s)(--[\w.-]+)", code):
            assert flag in known or flag.endswith(".") or f'"{flag}"' in sources, flag


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *PAGES])
def test_files_modules_and_targets_of_make_exist(name):
    targets = set(re.findall(r"^([\w-]+):", read_makefile(), re.M))
    text = read(name)
    assert set(re.findall(r"`make ([\w-]+)", text)) | set(re.findall(r"^make ([\w-]+)", text, re.M)) <= targets
    for path in re.findall(r"(?<![\w./-])(?:epg_fast|tests|bench|kernels|docs|demo|notebooks|tools)/[\w./-]*\w", text):
        assert (ROOT / path).exists() or path.startswith("docs/_build") or Path(path).stem == "x", path
    for module in re.findall(r"python -m (bench[\w.]*)", text):
        assert importlib.util.find_spec(module), module


def read_makefile():
    return (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", *PAGES])
def test_python_in_the_text_imports_what_exists(name):
    for content in (content for language, content in fences(name) if language == "python"):
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("epg_fast"):
                if node.module == "epg_fast.diffusers":
                    pytest.importorskip("diffusers")
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("name", PAGES)
def test_lines_are_short_enough_to_be_read(name):
    tables = re.compile(r"^\s*\|")
    for line in prose(name).splitlines():
        assert tables.match(line) or len(line) <= 100, line
    for language, content in fences(name):
        assert all(len(line) <= 120 for line in content.splitlines()), language


def variables_of_the_sources():
    """Names of environment variables in what is packaged, built and tested."""
    names, own = set(), [*ROOT.glob("*.py")]
    for folder in ("epg_fast", "kernels", "bench", "tests", "demo", "notebooks", "tools"):
        own += (ROOT / folder).rglob("*.py")
    for path in own:
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"environ(?:\.get|\.setdefault|\.pop)?[\[(]\s*\"(\w+)\"", text))
        for added in re.findall(r"environ \|= \{(.*?)\}", text):
            names |= set(re.findall(r"\"(\w+)\":", added))
        if path.name == "distributed.py":
            names |= set(re.findall(r"(?:number\(|for name in \(|, )\"([A-Z_]{4,})\"", text))
        if found := re.search(r"_OF_RANKS = \((.*)\)", text):
            names |= set(re.findall(r"\w+", found[1]))
    names |= {n for pair in re.findall(r"ENV\{(\w+)\}|ENV (\w+)", (ROOT / "CMakeLists.txt").read_text()) for n in pair}
    names |= set(re.findall(r"^(\w+) \?=", read_makefile(), re.M))
    names |= set(re.findall(r"(?:export|&&|\t) *([A-Z_]{4,})=", read_makefile()))
    names |= set(re.findall(r"\b([A-Z_]{4,})=", (ROOT / "bench/gpu_check.sh").read_text()))
    return names - {""}


def test_the_page_of_environment_variables_is_complete():
    found = variables_of_the_sources()
    assert {"EPG_DEBUG", "WORLD_SIZE", "MAX_JOBS", "LEDGER_TORCH", "CUDA_HOME"} <= found
    assert found <= set(inline_code("docs/environment.md"))


def test_own_variables_on_the_page_are_read_somewhere():
    sources = [ROOT / "setup.py", ROOT / "CMakeLists.txt", ROOT / "Makefile", *(ROOT / "epg_fast").rglob("*.py")]
    text = "".join(path.read_text(encoding="utf-8") for path in [*sources, *(ROOT / "tests").rglob("*.py")])
    own = [code for code in inline_code("docs/environment.md") if re.fullmatch(r"EPG_\w+", code)]
    assert len(own) > 8 and all(name in text for name in own)


def test_docstrings_keep_their_structure():
    text = """Sum of x_ and `y_`.

    y = a * b
    z = |y|

Args:
    x: first, which
        goes on.
    y: second.
Raises ValueError."""
    assert restructured(text.split("\n")) == [
        "Sum of x\\_ and ``y_``.",
        *("", "::", "", "    y = a * b", "    z = |y|", "", ""),
        *("Args:", "", "- x: first, which", "  goes on.", "- y: second.", "", "", "Raises ValueError."),
    ]


def test_messages_that_are_explained_are_those_of_the_sources():
    pieces = []
    for path in [ROOT / "setup.py", *(ROOT / "epg_fast").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.append(" ".join(node.value.split()))
    text = "\n".join(pieces)
    terms = re.findall(r"^(`.*)\n:   ", read("docs/troubleshooting.md"), re.M)
    assert len(terms) > 30
    for term in terms:
        if not term.endswith("(PyTorch's own)"):
            for message in re.findall(r"`([^`]+)`", term):
                assert message in text, message


@pytest.mark.slow
def test_hours_of_recipes_are_those_of_the_dry_run():
    from epg_fast import training
    from epg_fast.training import estimate

    section = read("docs/training.md").partition("## Hours per recipe")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| `([^`]+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \| ([^|]+) \|$", section, re.M)
    assert len(rows) == 8
    for command, parameters, steps, duration in rows:
        job, *flags = command.split()
        run = parse(_JOBS[job].configs, [*flags, "--outdir", "none"], job)[0]
        stage = estimate.planned_stage(run, getattr(training, _JOBS[job].run.keywords["stage"]), gpus=8)
        assert estimate._parameters(stage).startswith(f"{parameters} ") and f"{run.steps:,}" == steps
        for gpu in ("H100", "H200"):
            assert estimate._duration(stage, 8, estimate.gpu_named(gpu), 0.6).startswith(f"{duration} on")


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    for name in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", tmp_path / "trees"]
    done = subprocess.run([*command, "docs", tmp_path / "html"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "html" / "flags" / "sample.html").is_file()
    assert "interval guidance" in (tmp_path / "html" / "api" / "sampling.html").read_text()
