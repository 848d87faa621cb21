"""Runs the example tasks as trainyard would: the request on stdin, and what they
tell in lines on stdout. Needs Python 3.9, and jq for the shell script's tests.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
TRAIN_DIGITS = EXAMPLES / "python" / "train_digits.py"
TRAIN_SKLEARN = EXAMPLES / "python" / "train_sklearn.py"
BACKUP = EXAMPLES / "shell" / "backup.sh"
PREFIX = "@trainyard "
# Only against hanging.
PATIENCE = 120


class Child:
    """An example that runs, with `stdout` as the lines it has written so far."""

    def __init__(self, command, request, **env):
        self.stdout = []
        self.process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"PATH": os.environ["PATH"], **{key: str(value) for key, value in env.items()}},
            # A group of its own, as under trainyard.
            start_new_session=True,
        )
        self.watchdog = threading.Timer(PATIENCE, self.signal, [signal.SIGKILL])
        self.watchdog.start()
        # It may have ended without reading.
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stdin:
            stdin.write(request if isinstance(request, str) else json.dumps(request))

    def signal(self, number):
        os.killpg(self.process.pid, number)

    def wait_for(self, text):
        for line in self.process.stdout:
            self.stdout.append(line)
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}: {self.stdout} {self.process.stderr.read()}")

    def end(self):
        """Waits for the end; sets `code` and `stderr`."""
        # What is written to stderr is short: it cannot fill its pipe meanwhile.
        self.stdout += self.process.stdout
        self.stderr = self.process.stderr.read()
        self.code = self.process.wait()
        self.watchdog.cancel()
        self.process.stdout.close()
        self.process.stderr.close()
        return self

    def told(self, kind=None):
        """What the lines for trainyard say: all, or those of one kind."""
        told = [json.loads(line[len(PREFIX) :]) for line in self.stdout if line.startswith(PREFIX)]
        return [each[kind] for each in told if kind in each] if kind else told


class ExampleTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory(prefix="trainyard-test.")
        self.addCleanup(directory.cleanup)
        self.directory = Path(directory.name)

    def assert_ended(self, child, code):
        self.assertEqual(child.code, code, f"stdout: {child.stdout}\nstderr: {child.stderr}")
        self.assertNotIn("Traceback", child.stderr)


class TrainDigits(ExampleTest):
    # Small, and long enough for an interruption to matter.
    REQUEST = {"name": "train-digits", "epochs": 3, "hidden": 24, "seed": 5}

    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory(prefix="trainyard-test.") as directory:
            cls.uninterrupted = cls.train(directory, cls.REQUEST).end()
            cls.trained = Path(cls.uninterrupted.told("checkpoint")[-1]).read_bytes()

    @staticmethod
    def train(directory, request, **env):
        env = {"CHECKPOINT_DIR": directory, "TRAINYARD_JOB_ID": "job-1", **env}
        return Child([sys.executable, TRAIN_DIGITS], request, **env)

    def assert_same_as_uninterrupted(self, child):
        self.assert_ended(child, 0)
        self.assertEqual(child.told("result"), self.uninterrupted.told("result"))
        self.assertEqual(Path(child.told("checkpoint")[-1]).read_bytes(), self.trained)

    def test_it_tells_checkpoints_progress_and_the_result(self):
        child = self.uninterrupted
        self.assert_ended(child, 0)
        self.assertEqual(child.stderr, "")
        kinds = [next(iter(each)) for each in child.told()]
        self.assertEqual(kinds, ["checkpoint", "progress"] * 3 + ["result"])
        progress = [each for each in child.told() if "progress" in each]
        self.assertEqual([each["step"] for each in progress], [1, 2, 3])
        self.assertEqual([round(each["progress"], 3) for each in progress], [0.333, 0.667, 1.0])
        losses = [each["metrics"]["loss"] for each in progress]
        self.assertEqual(losses, sorted(losses, reverse=True))
        self.assertEqual(child.told("result"), [{"epochs": 3, **progress[-1]["metrics"]}])

    def test_it_learns_to_read_digits(self):
        child = self.train(self.directory, {"epochs": 8}).end()
        self.assert_ended(child, 0)
        [result] = child.told("result")
        self.assertGreaterEqual(result["accuracy"], 0.93)

    def test_a_run_stopped_twice_by_sigterm_ends_as_if_uninterrupted(self):
        first = self.train(self.directory, {**self.REQUEST, "seconds_per_epoch": 2})
        first.wait_for('"progress"')
        first.signal(signal.SIGTERM)
        first.end()
        self.assert_ended(first, 75)
        self.assertEqual(first.told("result"), [])
        self.assertIn("checkpoint", first.told()[-1])

        checkpoint = first.told("checkpoint")[-1]
        # An epoch of an hour: it has to leave in the middle.
        second = self.train(
            self.directory,
            {**self.REQUEST, "seconds_per_epoch": 3600},
            TRAINYARD_CHECKPOINT=checkpoint,
        )
        second.wait_for("going on from")
        # No line tells of the first batch. If it takes longer, this stops before it.
        time.sleep(0.3)
        second.signal(signal.SIGTERM)
        second.end()
        self.assert_ended(second, 75)
        self.assertEqual([list(each) for each in second.told()], [["checkpoint"]])

        checkpoint = second.told("checkpoint")[-1]
        last = self.train(self.directory, self.REQUEST, TRAINYARD_CHECKPOINT=checkpoint).end()
        self.assertLessEqual(len(last.told("progress")), 2)
        self.assert_same_as_uninterrupted(last)

    def test_a_killed_run_goes_on_from_its_last_checkpoint(self):
        killed = self.train(self.directory, {**self.REQUEST, "seconds_per_epoch": 1})
        killed.wait_for('"checkpoint"')
        killed.wait_for('"checkpoint"')
        killed.signal(signal.SIGKILL)
        killed.end()
        self.assert_ended(killed, -signal.SIGKILL)

        checkpoint = killed.told("checkpoint")[-1]
        resumed = self.train(self.directory, self.REQUEST, TRAINYARD_CHECKPOINT=checkpoint).end()
        self.assertLessEqual(len(resumed.told("progress")), 1)
        self.assert_same_as_uninterrupted(resumed)

    def test_a_training_can_be_cut_at_any_batch(self):
        module = load_module(TRAIN_DIGITS)
        settings = module.parse_settings(json.dumps({"hidden": 8, "batch": 100}).encode())
        training, _ = module.load_digits(settings.data)
        whole = module.new_state(settings)
        self.assertTrue(module.train_epoch(whole, settings, training, module.Stop()))

        path = self.directory / "cut.json"
        cut, cuts = module.new_state(settings), 0
        while not module.train_epoch(cut, settings, training, StopAfterOneBatch()):
            cuts += 1
            self.assertEqual(cut.position, 100 * cuts)
            module.save_checkpoint(path, settings, cut)
            with contextlib.redirect_stdout(None):
                cut = module.resume(str(path), settings)
        self.assertEqual(cuts, len(training) // 100)
        self.assertEqual(cut, whole)
        self.assertEqual(os.listdir(self.directory), ["cut.json"], "nothing else is left")

    def test_a_checkpoint_that_cannot_be_used_means_starting_over(self):
        of_another = self.directory / "another.json"
        content = json.loads(self.trained)
        content["settings"]["hidden"] += 1
        of_another.write_text(json.dumps(content))
        torn = self.directory / "torn.json"
        torn.write_bytes(self.trained[:1000])
        for checkpoint in (of_another, torn, self.directory / "missing.json", self.directory):
            with self.subTest(checkpoint=checkpoint.name):
                request = {**self.REQUEST, "epochs": 1}
                child = self.train(self.directory, request, TRAINYARD_CHECKPOINT=checkpoint).end()
                self.assert_ended(child, 0)
                self.assertIn(f"starting over, since {checkpoint} cannot be used", child.stderr)
                self.assertEqual(child.told("metrics"), self.uninterrupted.told("metrics")[:1])

    def test_a_bad_request_is_refused_for_good(self):
        digits_as_text = self.directory / "digits.csv"
        digits_as_text.write_text("pixel\n1\n")
        requests = {
            "": "not JSON",
            "{": "not JSON",
            "\0": "not JSON",
            "[" * 100_000: "not JSON",
            "[]": "not a JSON object",
            '{"epoch": 3}': "`epoch`",
            '{"epochs": 0}': "`epochs`",
            '{"epochs": 2.0}': "`epochs`",
            '{"epochs": true}': "`epochs`",
            '{"epochs": "3"}': "`epochs`",
            '{"epochs": null}': "`epochs`",
            '{"hidden": 1e999}': "`hidden`",
            '{"learning_rate": NaN}': "`learning_rate`",
            '{"learning_rate": 0}': "`learning_rate`",
            '{"seconds_per_epoch": -1}': "`seconds_per_epoch`",
            '{"data": 3}': "`data`",
            json.dumps({"data": "a\0b"}): "null",
            json.dumps({"data": str(digits_as_text)}): "does not hold the digits",
        }
        for request, reason in requests.items():
            with self.subTest(request=request[:40]):
                child = self.train(self.directory, request).end()
                self.assert_ended(child, 65)
                self.assertIn(reason, child.stderr)
                self.assertEqual(child.stdout, [])

    def test_data_that_is_away_is_worth_another_attempt(self):
        child = self.train(self.directory, {"data": str(self.directory / "away.csv.gz")}).end()
        self.assert_ended(child, 66)
        self.assertIn("away.csv.gz", child.stderr)

    def test_checkpoints_go_where_they_are_told_to(self):
        request = {**self.REQUEST, "epochs": 1}
        command = [sys.executable, TRAIN_DIGITS]
        shared, work = self.directory / "not" / "there", self.directory / "work"
        places = [
            ({"CHECKPOINT_DIR": shared, "TRAINYARD_WORK_DIR": work}, shared / "job-2.json"),
            ({"TRAINYARD_WORK_DIR": work}, work / "job-2.json"),
        ]
        for env, path in places:
            child = Child(command, request, TRAINYARD_JOB_ID="job-2", **env).end()
            self.assert_ended(child, 0)
            self.assertEqual(child.told("checkpoint"), [str(path)])
            self.assertTrue(path.exists())
        by_hand = Child(command, request, TMPDIR=self.directory).end()
        self.assert_ended(by_hand, 0)
        [path] = by_hand.told("checkpoint")
        self.assertEqual(Path(path).parent.parent, self.directory)


class TrainSklearn(ExampleTest):
    def test_without_scikit_learn_it_says_so_and_is_not_tried_again(self):
        # -S leaves out what is installed.
        child = Child([sys.executable, "-S", TRAIN_SKLEARN], {}).end()
        self.assert_ended(child, 78)
        self.assertIn("pip install scikit-learn", child.stderr)


@unittest.skipUnless(shutil.which("jq"), "jq is missing")
class Backup(ExampleTest):
    def setUp(self):
        super().setUp()
        self.models = self.directory / "models" / "digits"
        self.models.mkdir(parents=True)
        for name in ("a.json", "b b.json", "-c"):
            (self.models / name).write_text(name)
        self.target = self.directory / "backups" / "job-1"

    def backup(self, request, **env):
        env = {
            "SOURCE_DIR": self.models.parent,
            "BACKUP_DIR": self.target.parent,
            "TRAINYARD_JOB_ID": "job-1",
            **env,
        }
        return Child(["sh", BACKUP], request, **env)

    def test_each_entry_becomes_an_archive(self):
        child = self.backup({"name": "backup", "directory": "digits"}).end()
        self.assert_ended(child, 0)
        self.assertEqual(child.told("step"), [1, 2, 3])
        self.assertEqual(child.told("progress")[-1], 1)
        self.assertEqual(child.told("result"), [{"archives": 3, "to": str(self.target)}])
        archives = sorted(os.listdir(self.target))
        self.assertEqual(archives, ["-c.tar.gz", "a.json.tar.gz", "b b.json.tar.gz"])

    def test_a_stopped_attempt_leaves_nothing_half_made_and_the_next_goes_on(self):
        self.target.mkdir(parents=True)
        done = self.target / "a.json.tar.gz"
        done.write_text("packed before")
        programs = self.directory / "bin"
        programs.mkdir()
        endless = programs / "tar"
        endless.write_text('#!/bin/sh\n>"$4"\necho packing\nexec sleep 600\n')
        endless.chmod(0o755)
        stopped = self.backup({"directory": "digits"}, PATH=f"{programs}:{os.environ['PATH']}")
        stopped.wait_for("packing")
        stopped.signal(signal.SIGTERM)
        stopped.end()
        self.assert_ended(stopped, 75)
        self.assertEqual(os.listdir(self.target), [done.name])

        self.assert_ended(self.backup({"directory": "digits"}).end(), 0)
        self.assertEqual(len(os.listdir(self.target)), 3)
        self.assertEqual(done.read_text(), "packed before")

    def test_a_bad_request_is_refused_for_good(self):
        for request in (
            "", "{", "[]", "null", "{}",
            '{"directory": 3}', '{"directory": ""}', '{"directory": ".."}',
            '{"directory": "/etc"}', '{"directory": "../models"}', '{"directory": "-x"}',
            '{"directory": "$(id)"}', '{"directory": "digits", "to": "/tmp"}',
        ):  # fmt: skip
            with self.subTest(request=request):
                child = self.backup(request).end()
                self.assert_ended(child, 65)
                self.assertEqual(child.stdout, [])

    def test_what_the_worker_lacks_is_told(self):
        child = self.backup({"directory": "digits"}, SOURCE_DIR="").end()
        self.assert_ended(child, 78)
        child = self.backup({"directory": "other"}).end()
        self.assert_ended(child, 66)


class StopAfterOneBatch:
    """Takes the place of `Stop`: asks to stop when one batch is done."""

    requested = False

    def sleep_until(self, _):
        self.requested = True


def load_module(path):
    # Or Python would leave compiled files beside the example.
    sys.dont_write_bytecode = True
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    unittest.main()
