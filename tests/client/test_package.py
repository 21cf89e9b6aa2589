"""Compute packages without a server: what is read, packed and run, and that nothing of it is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from fl_client import command
from fl_client.command import CommandFailed
from fl_client.environment import virtual_environment
from fl_client.manifest import PackageError, find_folder, read_manifest, read_python_env
from fl_client.package import Package, RemotePackage, create
from fl_client.task import Due, TaskFailed, TaskInfo

MODEL = bytearray(b"the exact bytes")
GOOD = """cp "$1" "$2"; echo '{"num_examples": 3}' > "$2-metadata" """


def make_package(folder: Path, train: str = GOOD, **others: str) -> Path:
    """Entry points are shell scripts, which get the arguments as $1 and $2."""
    folder.mkdir(parents=True, exist_ok=True)
    points = {}
    for name, script in {"train": train, **others}.items():
        (folder / f"{name}.sh").write_text(script)
        points[name] = {"command": f"sh {name}.sh"}
    (folder / "fedn.yaml").write_text(json.dumps({"entry_points": points}))
    return folder


def task(kind: Any = "train", due: Due | None = None, **settings: Any) -> TaskInfo:
    return TaskInfo("t1", kind, "s1", 3, 1, "m0", "a", settings, 0.0, due or Due())


# ---- fedn.yaml


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entry_points: [", "fedn.yaml: no YAML: "),
        ("- train", "fedn.yaml: a mapping is needed"),
        ("3: 4", "fedn.yaml: a mapping is needed"),
        ("", "fedn.yaml: a mapping is needed"),
        ("entrypoints: {}", "fedn.yaml: entrypoints: unknown; python_env and entry_points are known"),
        ("python_env: env.yaml", "fedn.yaml: entry_points: missing"),
        ("entry_points: train", "fedn.yaml: entry_points: 'train' is not a mapping"),
        ("python_env: 3\nentry_points: {}", "fedn.yaml: python_env: 3 is not the name of a file"),
        ("entry_points: {trian: {command: a}}", "fedn.yaml: entry_points.trian: unknown; known are build, "),
        ("entry_points: {train: python train.py}", "fedn.yaml: entry_points.train.command: a command line is needed"),
        ("entry_points: {train: {command: 3}}", "fedn.yaml: entry_points.train.command: a command line is needed"),
        ("entry_points: {train: {command: ' '}}", "fedn.yaml: entry_points.train.command: a command line is needed"),
        ("!!python/object/apply:os.system ['true']", "fedn.yaml: no YAML: "),
    ],
)
def test_a_fedn_yaml_that_is_wrong_is_refused_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "fedn.yaml").write_text(text)
    with pytest.raises(PackageError) as refused:
        read_manifest(tmp_path)
    assert message in str(refused.value)


def test_a_missing_entry_point_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"fedn\.yaml: entry_points\.validate: missing"):
        read_manifest(make_package(tmp_path)).command("validate")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: 3", "name: 3 is not a text"),
        ("dependencies: numpy", "dependencies: 'numpy' is not a list of requirements"),
        ("build_dependencies: [1]", r"build_dependencies: \[1\] is not a list of requirements"),
        ("dependencies: ['a\\nb']", "dependencies: "),
    ],
)
def test_a_python_env_that_is_wrong_is_refused_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "env.yaml").write_text(text.replace("'a\\nb'", '"a\\nb"'))
    with pytest.raises(PackageError, match=message):
        read_python_env(tmp_path / "env.yaml")


def test_fedn_yaml_is_found_nearest_to_the_top(tmp_path: Path) -> None:
    make_package(tmp_path / "b" / "deep")
    make_package(tmp_path / "a" / "deep" / "deeper")
    make_package(tmp_path / ".hidden")
    assert find_folder(tmp_path) == tmp_path / "b" / "deep"
    make_package(tmp_path)
    assert find_folder(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("name", "message"), [("none", "no such folder"), ("file", "not a folder"), ("", "no fedn.yaml")]
)
def test_a_folder_that_is_no_package_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PackageError, match=message):
        Package(tmp_path / name)


# ---- packing


def names_in(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def test_the_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name in ("one", "two"):
        folder = make_package(tmp_path / name, validate="true")
        (folder / "lib").mkdir()
        (folder / "lib" / "shared.py").write_text("x = 1")
        (folder / "train.sh").chmod(0o700 if name == "one" else 0o755)
        os.utime(folder / "train.sh", (1, 1) if name == "one" else None)
        create(folder, tmp_path / f"{name}.tgz")
        made.append((tmp_path / f"{name}.tgz").read_bytes())
    assert made[0] == made[1]
    assert names_in(tmp_path / "one.tgz") == ["fedn.yaml", "lib/shared.py", "train.sh", "validate.sh"]


def test_what_fednignore_names_is_left_out_and_so_are_caches_and_the_package_itself(tmp_path: Path) -> None:
    folder = make_package(tmp_path)
    for name in (
        "data/big.csv",
        "lib/a.log",
        "lib/keep.py",
        "lib/__pycache__/a.pyc",
        "notes/private/x",
        "notes/y",
        "logs",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / ".fednignore").write_text("# comments\n\ndata/\n*.log\nnotes/private\nlogs/\n")
    create(folder, folder / "package.tgz")
    create(folder, folder / "package.tgz")
    assert names_in(folder / "package.tgz") == ["fedn.yaml", "lib/keep.py", "logs", "notes/y", "train.sh"]


def test_what_cannot_be_a_package_is_refused_and_an_older_one_kept(tmp_path: Path) -> None:
    output = tmp_path / "package.tgz"
    output.write_bytes(b"older")
    with pytest.raises(PackageError, match=r"no fedn\.yaml in it"):
        create(tmp_path, output)
    folder = make_package(tmp_path / "client")
    (folder / "a:b").touch()
    with pytest.raises(PackageError, match="'a:b' has a backslash or a colon"):
        create(folder, output)
    (folder / "a:b").unlink()
    (folder / "secret").symlink_to("/etc/passwd")
    with pytest.raises(PackageError, match="secret: a link"):
        create(folder, output)
    assert output.read_bytes() == b"older"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["client", "package.tgz"]
    (folder / "secret").unlink()
    with pytest.raises(PackageError, match="nowhere: no such folder"):
        create(folder, tmp_path / "nowhere" / "package.tgz")


# ---- entry points


async def test_train_gets_the_models_bytes_and_settings_and_gives_its_own_and_its_metadata(tmp_path: Path) -> None:
    script = """
    cp "$1-metadata" settings.json; echo "$1" > name; env > env; pwd > where; (cat "$1"; printf " trained") > "$2"
    echo '{"num_examples": 3, "loss": NaN, "nested": [Infinity, {"a": 1}]}' > "$2-metadata"
    """
    folder = make_package(tmp_path / "a 'b", script)
    trained = await Package(folder, client_name="Ada", helper_type="numpyhelper").train(MODEL, task(rate=0.5))
    assert trained.data == MODEL + b" trained"
    assert trained.sha256 == hashlib.sha256(trained.data).hexdigest()
    assert trained.metadata == {"num_examples": 3, "loss": None, "nested": [None, {"a": 1}]}
    assert json.loads((folder / "settings.json").read_text()) == {"rate": 0.5}
    assert (folder / "where").read_text().strip() == str(folder)
    said = dict(line.split("=", 1) for line in (folder / "env").read_text().splitlines() if line.startswith("FL_"))
    assert said == {
        "FL_ROUND": "3", "FL_CLIENT_ID": "a", "FL_CLIENT_NAME": "Ada", "FL_SESSION_ID": "s1", "FL_TASK_ID": "t1",
        "FL_HELPER_TYPE": "numpyhelper",
    }  # fmt: skip
    model = Path((folder / "name").read_text().strip())
    assert model.suffix == ".npz", "numpy appends it to what has none"
    assert not model.parent.exists(), "the files of a task go with it"


async def test_validate_and_predict_give_json(tmp_path: Path) -> None:
    metrics = """echo '{"accuracy": 0.5, "report": "text", "worst": NaN}' > "$2" """
    ours = Package(make_package(tmp_path, validate=metrics, predict='echo "[1, 2]" > "$2"'))
    validated = json.loads(await ours.validate(MODEL, task("validate")))
    assert validated == {"accuracy": 0.5, "report": "text", "worst": None}
    assert json.loads(await ours.predict(MODEL, task("predict"))) == [1, 2]


async def test_an_edit_counts_from_the_next_task(tmp_path: Path) -> None:
    ours = Package(make_package(tmp_path))
    await ours.train(MODEL, task())
    make_package(tmp_path, """printf edited > "$2"; echo '{"num_examples": 3}' > "$2-metadata" """)
    assert (await ours.train(MODEL, task())).data == b"edited"
    (tmp_path / "fedn.yaml").write_text("entry_points: {}")
    assert (ours.refusal("train") or "").endswith("entry_points.train: missing")
    with pytest.raises(TaskFailed, match=r"entry_points\.train: missing"):
        await ours.train(MODEL, task())


async def test_python_is_the_one_that_runs_flclient_and_secrets_stay_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FL_TOKEN", "secret")
    monkeypatch.setenv("FEDN_AUTH_TOKEN", "secret")
    check = f"import sys, os; assert sys.prefix == {sys.prefix!r}; assert 'secret' not in os.environ.values()"
    (tmp_path / "check.py").write_text(check)
    await Package(make_package(tmp_path, f"python check.py && {GOOD}")).train(MODEL, task())


@pytest.mark.parametrize(
    ("script", "reason", "last_lines"),
    [
        ("echo out; echo err >&2; echo; exit 3", "train ended with exit code 3: err", ("out", "err", "")),
        ("kill -9 $$", "train was killed by SIGKILL", ()),
        ("printf 'half a line'; exit 1", "train ended with exit code 1: half a line", ("half a line",)),
        (r"printf '10%%\r100%%\n'; exit 1", "train ended with exit code 1: 100%", ("100%",)),
        ("nonesuch", "train ended with exit code 127: ", None),
        ("true", "train ended well, but wrote no model to its second argument", ()),
        ('cp "$1" "$2"', "train ended well, but wrote no trained.npz-metadata", ()),
        ('cp "$1" "$2"; echo [] > "$2-metadata"', "train wrote no JSON object to trained.npz-metadata", ()),
        ('cp "$1" "$2"; echo {a > "$2-metadata"', "train wrote no JSON to trained.npz-metadata: ", ()),
        ('cp "$1" "$2"; echo {} > "$2-metadata"', "-metadata num_examples None, expected a number", ()),
        (
            """cp "$1" "$2"; echo '{"num_examples": 0}' > "$2-metadata" """,
            "-metadata num_examples 0, expected a finite number above 0",
            (),
        ),
    ],
)
async def test_an_entry_point_that_fails_says_how_and_gives_its_last_lines(
    tmp_path: Path, script: str, reason: str, last_lines: tuple[str, ...] | None
) -> None:
    with pytest.raises(TaskFailed) as failed:
        await Package(make_package(tmp_path, script)).train(MODEL, task())
    assert reason in str(failed.value)
    assert last_lines is None or failed.value.last_lines == last_lines


async def test_of_much_output_the_last_20_lines_are_kept_and_all_go_to_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = "seq 1 1000; head -c 10000 /dev/zero | tr '\\0' x; exit 1"
    with caplog.at_level("INFO", "fl_client"), pytest.raises(TaskFailed) as failed:
        await Package(make_package(tmp_path, script)).train(MODEL, task())
    lines = failed.value.last_lines
    assert len(lines) == 20
    assert lines[-4] == "1000" and [len(line) for line in lines[-3:]] == [4096, 4096, 1808]
    assert [record.message for record in caplog.records][:1000] == [f"train: {n}" for n in range(1, 1001)]
    assert len(str(failed.value)) <= 500


# ---- the end of its processes


def processes(mark: str) -> list[int]:
    """Of those that have it in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if mark.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


HANGS = "sleep {mark} & echo started; wait"


@pytest.fixture
def mark() -> str:
    """A duration for `sleep` by which it is found among all processes."""
    return f"{1000 + os.getpid()}.{os.urandom(3).hex().translate(str.maketrans('abcdef', '123456'))}"


async def test_at_its_deadline_a_task_is_killed_with_all_its_processes(tmp_path: Path, mark: str) -> None:
    ours = Package(make_package(tmp_path, HANGS.format(mark=mark)))
    due = Due(asyncio.get_running_loop().time() + 0.3)
    with pytest.raises(TaskFailed, match="train was killed: it did not end by its deadline"):
        await ours.train(MODEL, task(due=due))
    assert processes(mark) == []


async def test_a_process_that_ignores_sigterm_is_killed(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_GRACE_S", 0.05)
    ours = Package(make_package(tmp_path, f"trap '' TERM; {HANGS.format(mark=mark)}; wait"))
    with pytest.raises(TaskFailed, match="it did not end by its deadline"):
        await ours.train(MODEL, task(due=Due(asyncio.get_running_loop().time() + 0.3)))
    assert processes(mark) == []


async def test_a_task_that_is_cancelled_leaves_no_process(tmp_path: Path, mark: str) -> None:
    os.mkfifo(tmp_path / "fifo")
    ours = Package(make_package(tmp_path, f"echo > fifo; {HANGS.format(mark=mark)}"))
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        running = group.create_task(ours.train(MODEL, task()))
        await asyncio.to_thread((tmp_path / "fifo").read_bytes)  # it has begun
        running.cancel()
    assert processes(mark) == []


async def test_what_a_command_leaves_running_is_ended_and_does_not_hold_the_task(tmp_path: Path, mark: str) -> None:
    trained = await Package(make_package(tmp_path, f"sleep {mark} & {GOOD}")).train(MODEL, task())
    assert trained.data == MODEL
    assert processes(mark) == []


async def test_a_deadline_that_the_server_moves_counts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    loop = asyncio.get_running_loop()
    due = Due(loop.time() + 0.2)

    def move() -> None:
        due.at_s += 60

    def let_go() -> None:
        (tmp_path / "fifo").write_text("go\n")

    loop.call_at(due.at_s - 0.01, move)
    loop.call_at(due.at_s + 0.01, lambda: loop.run_in_executor(None, let_go))
    await Package(make_package(tmp_path, f"read line < fifo; {GOOD}")).train(MODEL, task(due=due))


async def test_a_task_whose_deadline_is_over_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(TaskFailed, match="train was not begun: its deadline was over"):
        await Package(make_package(tmp_path, "touch begun")).train(MODEL, task(due=Due(0.0)))
    assert not (tmp_path / "begun").exists()


async def test_startup_runs_once_before_the_first_task_and_its_failure_is_told(tmp_path: Path) -> None:
    ours = Package(make_package(tmp_path, startup="echo x >> started"))
    await ours.prepare()
    await ours.train(MODEL, task())
    assert (tmp_path / "started").read_text() == "x\n"
    make_package(tmp_path, startup="echo no room; exit 4")
    with pytest.raises(PackageError, match="startup ended with exit code 4: no room"):
        await ours.prepare()
    (tmp_path / "fedn.yaml").write_text("entry_points: {build: {command: 'true'}}")
    with pytest.raises(PackageError, match=r"entry_points\.train: missing"):
        await ours.prepare()


# ---- python_env


def make_wheel(folder: Path) -> str:
    name = "fldep-1.0-py3-none-any.whl"
    about = "fldep-1.0.dist-info"
    with zipfile.ZipFile(folder / name, "w") as wheel:
        wheel.writestr("fldep.py", "found = True\n")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: fldep\nVersion: 1.0\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: ours\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", f"fldep.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return name


async def test_a_python_env_is_made_once_for_the_same_content_and_its_python_runs_the_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_package(tmp_path / "client", f"""python -c "import fldep; assert fldep.found" && {GOOD}""")
    wheel = make_wheel(folder)
    (folder / "fedn.yaml").write_text("python_env: env.yaml\nentry_points: {train: {command: sh train.sh}}")
    env = f"name: digits\npython: 2.7\nbuild_dependencies: []\ndependencies: [./{wheel}]\n"
    (folder / "env.yaml").write_text(env)
    ours = Package(folder)
    made = await asyncio.gather(ours.prepare(), virtual_environment(folder / "env.yaml"))
    assert len(list((tmp_path / "cache" / "flserve" / "envs").glob("*/.complete"))) == 1
    (folder / wheel).unlink()  # not needed again
    assert (await ours.train(MODEL, task())).data == MODEL
    assert await virtual_environment(folder / "env.yaml") == made[1]


async def test_an_environment_that_cannot_be_made_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = tmp_path / "env.yaml"
    spec.write_text("dependencies: [numpy]")
    (tmp_path / "python").write_text("#!/bin/sh\nmkdir $3; echo no ensurepip; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(PackageError, match=r"env\.yaml: making the environment ended with exit code 1: no ensurepip"):
        await virtual_environment(spec)
    assert [path.suffix for path in (tmp_path / "cache" / "flserve" / "envs").iterdir()] == [".lock"]


# ---- the server's package


class Api:
    """What RemotePackage asks of transport.RestApi."""

    def __init__(self) -> None:
        self.says = ""
        self.sends = b""
        self.downloads = 0

    def offer(self, data: bytes) -> None:
        self.sends, self.says = data, hashlib.sha256(data).hexdigest()

    async def package_checksum(self) -> str:
        return self.says

    async def package(self, to: BinaryIO, *, max_bytes: int) -> str:
        self.downloads += 1
        to.write(self.sends)
        return hashlib.sha256(self.sends).hexdigest()


def packed(folder: Path, train: str = GOOD) -> bytes:
    create(make_package(folder, train), folder.with_suffix(".tgz"))
    return folder.with_suffix(".tgz").read_bytes()


async def test_a_package_is_fetched_once_and_another_one_when_the_active_one_has_changed(tmp_path: Path) -> None:
    api: Any = Api()
    api.offer(packed(tmp_path / "one"))
    kept = tmp_path / "kept"
    ours = RemotePackage(api, kept)
    await ours.prepare()
    await ours.prepare()
    await RemotePackage(api, kept).prepare()  # another client of this machine
    assert api.downloads == 1
    assert (await ours.train(MODEL, task())).data == MODEL
    other = packed(tmp_path / "two", """printf two > "$2"; echo '{"num_examples": 1}' > "$2-metadata" """)
    api.offer(other)
    await ours.prepare()
    assert (await ours.train(MODEL, task())).data == b"two"
    assert len(list(kept.iterdir())) == 2


async def test_a_package_with_another_checksum_is_refused_and_not_kept(tmp_path: Path) -> None:
    api: Any = Api()
    api.offer(packed(tmp_path / "one"))
    with pytest.raises(PackageError, match=f"the active package has sha256 {api.says}, expected {'0' * 64}"):
        await RemotePackage(api, tmp_path / "kept", checksum="0" * 64).prepare()
    assert api.downloads == 0
    api.says = "1" * 64
    with pytest.raises(PackageError, match=f"the package has sha256 .*, the server says {'1' * 64}"):
        await RemotePackage(api, tmp_path / "kept").prepare()
    assert list((tmp_path / "kept").iterdir()) == []


async def test_a_package_that_is_bad_ends_a_new_client_and_fails_the_tasks_of_one_that_had_another(
    tmp_path: Path,
) -> None:
    api: Any = Api()
    api.offer(b"no archive")
    with pytest.raises(PackageError, match="cannot be unpacked: it is neither a tar"):
        await RemotePackage(api, tmp_path / "kept").prepare()
    api.offer(packed(tmp_path / "one"))
    ours = RemotePackage(api, tmp_path / "kept")
    await ours.prepare()
    api.offer(b"no archive")
    await ours.prepare()
    assert "cannot be unpacked" in (ours.refusal("train") or "")
    api.offer(packed(tmp_path / "two"))
    await ours.prepare()
    assert ours.refusal("train") is None


async def test_a_command_that_cannot_be_started_is_said(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="cannot be started: "):
        await command.run(["/nonesuch"], cwd=tmp_path, environment={}, say=print)
