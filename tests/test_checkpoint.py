"""The folder of a run: whether it may be used, and that nothing in it is lost or half written."""

import asyncio
import errno
import gc
import hashlib
import json
import logging
import os
import re
import resource
import shutil
import subprocess
from contextlib import contextmanager

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrft import config as configs
from jaxrft.config import Config, TasksConfig
from jaxrft.host.checkpoint import Checkpoints, flaw_of
from jaxrft.host.disk import check_room
from jaxrft.report.console import Display
from jaxrft.report.log import Reporter
from jaxrft.train.loop import train
from jaxrft.train.resume import open_folder, saved_steps, write_records
from jaxrft.train.state import Counters, TrainState
from jaxrft.types import InputError

COUNTS = {"num_tasks": 16, "held_out": {}}


def settings(folder, **changes):
    return Config(model="policy", tasks=TasksConfig(), output_dir=str(folder), **changes)


def state(step):
    noise = np.random.default_rng(step).normal(size=30_000).astype(np.float32)  # does not compress
    counters = Counters(jnp.zeros(3, jnp.int32), *jnp.zeros((2, 2), jnp.int32))
    return TrainState(jnp.int32(step), {"w": jnp.asarray(noise)}, {}, {}, None, counters)


def saved(folder, *steps):
    with Checkpoints(folder / "checkpoints", keep=3, identity={}) as checkpoints:
        for step in steps:
            checkpoints.save(state(step))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A run's folder with the checkpoint of step 1; copy it."""
    return saved(tmp_path_factory.mktemp("good"), 1)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run's folder with the checkpoints of steps 1, 2 and 3; copy it."""
    return saved(tmp_path_factory.mktemp("three"), 1, 2, 3)


def fill(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_a_url_is_no_folder(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(InputError, match=f"output_dir {url} is a URL.*mounted"),
        open_folder(settings(url)),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_opening_leaves_no_leftovers(tmp_path):
    with open_folder(settings(tmp_path / "a/run")) as folder:
        assert folder == tmp_path / "a/run"
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not list((tmp_path / "a/run").iterdir())
    saved(tmp_path / "a/run")  # a mistake found before the first checkpoint
    assert not list((tmp_path / "a/run").iterdir())


@pytest.mark.parametrize(
    ("resume", "names", "wanted"),
    [
        (
            "auto",
            ["policy/config.json", "config.json", "metrics.jsonl"],
            "holds a trained policy but no checkpoints",
        ),
        ("never", ["policy/config.json"], "move .*policy away to start a new run"),
        ("never", ["config.json"], "holds a run already"),
        ("never", ["metrics.jsonl"], "holds a run already"),
        ("never", ["checkpoints/3/state/data"], "holds a run already"),
    ],
)
def test_a_folder_that_would_be_overwritten_is_refused(resume, names, wanted, tmp_path):
    fill(tmp_path, names)
    with pytest.raises(InputError, match=wanted), open_folder(settings(tmp_path, resume=resume)):
        pass


@pytest.mark.parametrize(
    ("resume", "names", "afresh"),
    [
        ("never", ["checkpoints/3.saving/state"], False),
        ("never", ["notes.txt"], False),
        ("auto", ["config.json", "metrics.jsonl"], True),
        ("auto", ["metrics.jsonl", "checkpoints/3.saving/state"], True),
        (
            "auto",
            ["config.json", "metrics.jsonl", "policy/config.json", "checkpoints/3/state/data"],
            False,
        ),
    ],
)
def test_a_folder_that_is_used(resume, names, afresh, tmp_path, caplog):
    fill(tmp_path, names)
    with caplog.at_level(logging.INFO, "jaxrft"), open_folder(settings(tmp_path, resume=resume)):
        pass
    assert ["starts anew" in message for message in caplog.messages] == [True] * afresh


def test_a_folder_is_used_by_one_run_at_a_time(tmp_path, caplog):
    fill(tmp_path, ["config.json"])
    with open_folder(settings(tmp_path)):
        caplog.clear()
        for resume in ("auto", "never"):
            wanted = (
                f"output_dir {tmp_path} is in use by process {os.getpid()} on host .*: "
                "wait until it ends, or choose"
            )
            with (
                pytest.raises(InputError, match=wanted),
                open_folder(settings(tmp_path, resume=resume)),
            ):
                pass
        assert not caplog.messages  # such as that the other run has ended
    with open_folder(settings(tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.slow
def test_a_run_killed_before_its_first_checkpoint_starts_again(configure, whole, tmp_path, caplog):
    folder, end = whole
    run = tmp_path / "run"
    shutil.copytree(folder, run, ignore=shutil.ignore_patterns("checkpoints", "policy"))
    with caplog.at_level(logging.WARNING, "jaxrft"):
        helpers.assert_same_bits(train(configure(run)), end)
    assert helpers.metrics(run) == helpers.metrics(folder)
    assert "resumes with" not in caplog.text  # output_dir differs, but no run resumes


@pytest.mark.parametrize(
    "text", ["", '{"steps": 3, "se', "3", "null", "[" * 100_000, '{"steps": NaN}', "\0\xff"]
)
def test_a_config_that_cannot_be_read_is_rewritten(text, good, tmp_path, caplog):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.INFO, "jaxrft"):
        write_records(tmp_path, settings(tmp_path), **COUNTS)
    assert len(caplog.messages) == 1 and "unknown" in caplog.messages[0]
    assert (
        configs.differences(settings(tmp_path), json.loads((tmp_path / "config.json").read_text()))
        == {}
    )
    caplog.clear()
    write_records(tmp_path, settings(tmp_path, seed=3), **COUNTS)
    assert caplog.messages == ["this run resumes with seed 3, it was 0"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "config.json",
        "versions.json",
    }


@contextmanager
def full_disk(size):
    """Files of more than `size` bytes do not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_keeps_running_and_reports_once(tmp_path, caplog, capfd):
    write_records(tmp_path, settings(tmp_path), **COUNTS)
    before, metrics = (
        (tmp_path / "config.json").read_text(),
        {f"metric{i}": float(i) for i in range(100)},
    )
    reporter = Reporter(tmp_path / "metrics.jsonl", Display(3, visible=False))
    reporter.add(1, metrics)
    reporter.flush()
    caplog.clear()
    with Checkpoints(tmp_path / "checkpoints", keep=3, identity={}) as checkpoints:
        checkpoints.save(state(1))
        with full_disk(2000):
            with pytest.raises(
                InputError, match="File too large.* from the newest checkpoint, which is of step 1"
            ):
                checkpoints.save(state(2))
            with pytest.raises(InputError, match="cannot write to .*File too large"):
                write_records(tmp_path, settings(tmp_path, seed=3), **COUNTS)
            assert saved_steps(tmp_path) == [1]  # and nothing of step 2
            for step in (2, 3, 4):  # the second line fits in part
                reporter.add(step, metrics)
            with pytest.raises(InputError, match="File too large"):
                reporter.check_written()
        (sentence,) = (message for message in caplog.messages if "metrics" in message)
        assert sentence.startswith(
            "the metrics of step 2 wait in memory, and the run continues: cannot write to "
        )
        assert (
            tmp_path / "config.json"
        ).read_text() == before and "absl" not in capfd.readouterr().err
        reporter.flush()
        reporter.check_written()
        assert helpers.metrics(tmp_path) == [{"step": step} | metrics for step in (1, 2, 3, 4)]
        checkpoints.save(state(2))
        helpers.assert_same_bits(checkpoints.restore(state(9)), state(2))
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoints",
        "config.json",
        "metrics.jsonl",
        "versions.json",
    }


def test_refused_writes_are_not_reported_after_closing(tmp_path, caplog, monkeypatch):
    """What asyncio makes of a write that failed unseen, be it left in a cycle or held by the frames
    of the error.
    """

    loop = asyncio.new_event_loop()

    def refused():
        future = loop.create_future()
        future.set_exception(OSError(errno.ENOSPC, "No space left on device"))
        return future

    def save(*_, **__):
        left = [refused()]
        left.append(left)
        held = refused()
        raise ValueError(f"No space left on device: {held.done()}")

    gc.disable()  # as in a process that ends before anything is collected
    try:
        with (
            pytest.raises(InputError) as told,
            Checkpoints(tmp_path, keep=3, identity={}) as checkpoints,
        ):
            monkeypatch.setattr(checkpoints.orbax, "save", save)
            checkpoints.save(state(1))
        assert "No space left on device" in str(told.value)
        del told
        gc.collect()
    finally:
        gc.enable()
        loop.close()
    assert not [record for record in caplog.records if record.name == "asyncio"]


@pytest.mark.slow
def test_a_run_continues_on_a_full_disk_but_ends_with_an_error(configure, whole, tmp_path, caplog):
    folder, end = whole
    train(configure(tmp_path / "run", steps=3))
    wanted = r"checkpoints \(File too large\): .* from the newest checkpoint, which is of step 3"
    with full_disk(20_000), pytest.raises(InputError, match=wanted):
        train(configure(tmp_path / "run", save_steps=1))
    said = [message for message in caplog.messages if "is not saved" in message]
    assert [message[:41] for message in said] == [
        f"step {n} is not saved, and the run goes on:" for n in (4, 5)
    ]
    assert saved_steps(tmp_path / "run") == [3]
    helpers.assert_same_bits(train(configure(tmp_path / "run")), end)
    assert helpers.metrics(tmp_path / "run") == helpers.metrics(folder)


def test_room_for_a_checkpoint_of_several_processes_is_looked_for_first(tmp_path):
    check_room(tmp_path / "checkpoints", 10)
    with pytest.raises(InputError, match="checkpoints .No space left on device"):
        check_room(tmp_path / "checkpoints", 10**18)


def change(folder, name, content):
    """Puts other content, None = none, into a file of a checkpoint, and its digest into the
    sums.
    """
    sums = folder / "SHA256SUMS"
    lines = [
        line
        for line in sums.read_text().splitlines(keepends=True)
        if not line.endswith(f"  {name}\n")
    ]
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    sums.write_text("".join(lines))


IDENTITIES = {  # content of identity.json, whose sum is right -> what is said of it
    "garbage": (b"\xff\xfe", "identity.json cannot be read: it is not UTF-8 text"),
    "null": (b"null", "identity.json cannot be read: it holds null, not an object"),
    "a list": (b"[1, 2]", "identity.json cannot be read: it holds a list, not an object"),
    "a number": (b"7", "identity.json cannot be read: it holds a number, not an object"),
    "deep": (
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "identity.json cannot be read: it is nested more than",
    ),
    "cut": (b'{"a": 1', "identity.json cannot be read: it is not JSON"),
    "empty": (b"", "identity.json cannot be read: it is empty"),
    "a huge number": (
        b'{"a": ' + b"1" * 5000 + b"}",
        "identity.json cannot be read: it is not JSON",
    ),
    "missing": (None, "it has no identity.json"),
}


def damage(folder, how):
    """Tears a checkpoint."""
    sums, data = (
        folder / "SHA256SUMS",
        max(folder.glob("state/**/d/*"), key=lambda path: path.stat().st_size),
    )
    listed = sums.read_text()
    if how == "a byte is another":
        data.write_bytes(data.read_bytes()[:-1] + bytes([data.read_bytes()[-1] ^ 1]))
    elif how == "a file is cut":
        data.write_bytes(data.read_bytes()[:100])
    elif how == "a file is lost":
        data.unlink()
    elif how == "the sums are cut":
        sums.write_text("".join(listed.splitlines(keepends=True)[:2]))
    elif how == "the sums are cut to nothing":
        shutil.rmtree(folder)
        folder.mkdir()
        sums.touch()
    elif how == "the sums are lost":
        sums.unlink()
    elif how == "the sums are a folder":
        sums.unlink()
        sums.mkdir()
    elif how == "the sums are a pipe":
        sums.unlink()
        os.mkfifo(sums)
    elif how == "the sums are no text":
        sums.write_bytes(b"\xff" * 100)
    elif how == "orbax cannot read it":
        change(folder, "state/_METADATA", b"{}")
    elif how == "orbax finds it too deep":
        change(folder, "state/_METADATA", b"[" * 100_000)
    elif how == "a tree of other shapes":
        change(folder, "state/_METADATA", b'{"tree_metadata": {"a": null}}')
    elif how.startswith("identity: "):
        change(folder, "identity.json", IDENTITIES[how.removeprefix("identity: ")][0])
    return folder


DAMAGES = {
    "a byte is another": r"state/\S+ is not as SHA256SUMS says",
    "a file is cut": r"state/\S+ is not as SHA256SUMS says",
    "a file is lost": r"state/\S+ is missing",
    "the sums are cut": r"state/\S+ is not as SHA256SUMS says",
    "the sums are cut to nothing": "SHA256SUMS is empty",
    "the sums are a folder": "it cannot be read: .+",
    "the sums are a pipe": "it cannot be read: .+",
    "the sums are no text": "it cannot be read: .+",
    **{f"identity: {name}": f"{said}.*" for name, (_, said) in IDENTITIES.items()},
    "orbax finds it too deep": "orbax cannot read it: .+",
    "a tree of other shapes": "orbax cannot read it: .+",
    "the sums are lost": "it has no SHA256SUMS",
    "orbax cannot read it": "orbax cannot read it: .+",
}


@pytest.mark.parametrize("how", DAMAGES)
def test_every_damage_is_named(how, good, tmp_path):
    folder = damage(shutil.copytree(good, tmp_path / "run") / "checkpoints/1", how)
    if not how.startswith(("orbax", "a tree")):
        assert re.fullmatch(DAMAGES[how], flaw_of(folder))
        return
    with Checkpoints(folder.parent, keep=3, identity={}) as checkpoints:
        assert re.fullmatch(DAMAGES[how], checkpoints._read(1, state(9))[1])


@pytest.mark.parametrize(
    "how", [*list(DAMAGES)[:2], "the sums are a pipe", "identity: deep", "orbax cannot read it"]
)
def test_a_damaged_checkpoint_is_skipped_and_saved_anew(how, three, tmp_path, caplog):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "checkpoints/3", how)
    before = helpers.contents(tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep=3, identity={}) as checkpoints:
        helpers.assert_same_bits(checkpoints.restore(state(9)), state(2))
        assert checkpoints.newest == 2 and helpers.contents(tmp_path) == before
        (sentence,) = caplog.messages
        assert re.fullmatch(
            rf"skipping the checkpoint of step 3 \({DAMAGES[how]}\) in "
            r".*resuming from step 2",
            sentence,
        )
        checkpoints.save(state(3))
        helpers.assert_same_bits(checkpoints.restore(state(9)), state(3))
    assert helpers.checkpoints(tmp_path) == [1, 2, 3]


def test_without_a_good_checkpoint_resuming_is_refused_and_nothing_changes(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    for step, how in zip(saved_steps(tmp_path), list(DAMAGES)[-3:], strict=True):
        damage(tmp_path / f"checkpoints/{step}", how)
    before = helpers.contents(tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep=3, identity={}) as checkpoints:
        wanted = (
            r"no checkpoint in .* can be used: .*step 3 \(orbax.*; .*step 2 \(it has no "
            r".*; .*step 1 \(.*a copy"
        )
        with pytest.raises(InputError, match=wanted):
            checkpoints.restore(state(9))
    assert helpers.contents(tmp_path) == before


NO_STEPS = (
    "²",
    "٣",
    "01",
    "+1",
    "-1",
    "1_0",
    "10" + "0" * 30,
    "3.0",
    " 3",
    "4294967296",
    "1e3",
    "½",
    "三",
)


def test_only_the_folders_of_steps_are_checkpoints(tmp_path):
    folder = saved(tmp_path, 1, 2) / "checkpoints"
    for name in NO_STEPS:
        (folder / name).mkdir()
    (folder / "7").write_text("a plain file")
    (folder / "8").symlink_to(folder / "nowhere")
    (folder / "9").symlink_to(folder / "9")
    with Checkpoints(folder, keep=1, identity={}) as checkpoints:
        assert saved_steps(tmp_path) == [1, 2]
        helpers.assert_same_bits(checkpoints.restore(state(9)), state(2))
        for step in (7, 8):
            checkpoints.save(state(step))
            assert saved_steps(tmp_path) == [step]
    assert {*NO_STEPS} < {path.name for path in folder.iterdir()} and not list(
        folder.glob("*saving*")
    )


def test_links_are_neither_written_through_nor_removed_through(tmp_path):
    """A checkpoint may have been moved to another disk; what is written there stays as it is."""
    folder = saved(tmp_path, 1, 2) / "checkpoints"
    (folder / "2").rename(tmp_path / "moved")
    (folder / "2").symlink_to(tmp_path / "moved")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("kept")
    for name in ("3.saving", "3.old.saving", "junk.saving"):
        (folder / name).symlink_to(tmp_path / "precious")
    (folder / "4.saving").write_text("a plain file")
    before = helpers.contents(tmp_path / "moved") | helpers.contents(tmp_path / "precious")
    with Checkpoints(folder, keep=1, identity={}) as checkpoints:
        helpers.assert_same_bits(checkpoints.restore(state(9)), state(2))
        checkpoints.save(state(3))
    assert helpers.contents(tmp_path / "moved") | helpers.contents(tmp_path / "precious") == before
    assert [path.name for path in folder.iterdir()] == ["3"]


def test_memory_that_does_not_suffice_is_no_damage(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def restore(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with Checkpoints(tmp_path / "checkpoints", keep=3, identity={}) as checkpoints:
        monkeypatch.setattr(checkpoints.orbax, "restore", restore)
        with pytest.raises(jax.errors.JaxRuntimeError):
            checkpoints.restore(state(9))


def test_the_newest_stay_and_none_of_a_later_step(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 5)
    assert saved_steps(tmp_path) == [3, 4, 5]
    for step in (4, 5):
        damage(tmp_path / f"checkpoints/{step}", "the sums are lost")
    with Checkpoints(tmp_path / "checkpoints", keep=2, identity={}) as checkpoints:
        checkpoints.restore(state(9))
        checkpoints.save(state(4))
    assert helpers.checkpoints(tmp_path) == [3, 4]
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert (
        subprocess.run(check, cwd=tmp_path / "checkpoints/4", capture_output=True).returncode == 0
    )


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_from_the_newest_good_checkpoint(configure, whole, tmp_path):
    folder, end = whole
    run = shutil.copytree(folder, tmp_path / "run")
    damage(run / "checkpoints/6", "a file is cut")
    helpers.assert_same_bits(train(configure(run)), end)
    assert helpers.metrics(run) == helpers.metrics(folder) and helpers.checkpoints(run) == [3, 6]


def train_in_two_processes(folder, configurations):
    address = f"localhost:{helpers.free_port()}"
    members = []
    for index, config in enumerate(configurations):
        path = helpers.write_config(folder / f"config{index}.py", config)
        where = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": 2,
            "JAX_PROCESS_ID": index,
        }
        members.append(helpers.start("-m", "jaxrft", "train", path, devices=4, **where))
    return helpers.finish(*members)


@pytest.mark.slow
def test_processes_with_folders_of_their_own_are_refused(configure, tmp_path):
    outcomes = train_in_two_processes(
        tmp_path, [configure(tmp_path / name, distributed=True) for name in "ab"]
    )
    for code, _, errors in outcomes:
        assert code == 2 and "output_dir must be on storage that all hosts share" in errors, errors
        assert "Traceback" not in errors


@pytest.mark.slow
def test_processes_are_refused_by_the_first_alike(configure, tmp_path):
    fill(tmp_path / "run", ["policy/config.json"])
    for code, _, errors in train_in_two_processes(
        tmp_path, [configure(tmp_path / "run", distributed=True)] * 2
    ):
        assert code == 2 and "holds a trained policy but no checkpoints" in errors, errors


@pytest.mark.slow
def test_several_processes_resume_from_the_checkpoint_of_one(configure, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0], run)
    damage(shutil.copytree(run / "checkpoints/6", run / "checkpoints/9"), "a byte is another")
    fill(run, ["checkpoints/7.saving/state"])
    outcomes = train_in_two_processes(tmp_path, [configure(run, distributed=True)] * 2)
    assert [code for code, _, _ in outcomes] == [0, 0], outcomes
    assert "resuming after step 6" in outcomes[0][1] and "resuming" not in outcomes[1][1]
    assert [
        errors.count("skipping the checkpoint of step 9 (state/") for _, _, errors in outcomes
    ] == [1, 0]
    assert helpers.checkpoints(run) == [3, 6, 9]  # and no leftover


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            None,
            "have format 1, this version reads format 2: finish the run with jaxrft 0.1.0, "
            "or choose another",
        ),
        (
            3,
            "have format 3, this version reads format 2: finish the run with the version of "
            "jaxrft that made",
        ),
        (
            "2",
            "have format '2', this version reads format 2: finish the run with the version "
            "of jaxrft that made",
        ),
    ],
)
def test_checkpoints_of_another_format_are_refused_and_left_as_they_are(
    good, tmp_path, written, said
):
    identity = {} if written is None else {"format": written}
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "checkpoints/1", "identity.json", json.dumps(identity).encode())
    before = helpers.contents(tmp_path)
    with Checkpoints(tmp_path / "checkpoints", keep=3, identity={}) as checkpoints:
        with pytest.raises(InputError, match=said):
            checkpoints.restore(state(9))
    assert helpers.contents(tmp_path) == before
