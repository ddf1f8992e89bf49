"""The program itself: exit status, errors, and what is not imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tinkex import _version, cli, errors


def test_a_command_imports_the_modules_of_no_other():
    code = (
        "import sys, tinkex.cli; status = tinkex.cli.main(['checkpoint', 'list', '--help']); "
        "others = {f'tinkex.cli.{name}' for name in ('train', 'chat', 'serve', 'session')}; "
        "sys.exit(status or ', '.join(others & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


def test_help_imports_nothing_heavy():
    """Help must appear at once."""
    code = (
        "import sys, tinkex.cli; status = tinkex.cli.main(['--help']); "
        "heavy = {'numpy', 'requests', 'torch', 'google.protobuf', 'tqdm', 'cattrs'}; "
        "sys.exit(status or ', '.join(heavy & set(sys.modules)) or 0)"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert (0, "") == (done.returncode, done.stderr)
    assert "Usage: tinkex" in done.stdout


def test_python_m_tinkex_is_tinkex():
    command = [sys.executable, "-m", "tinkex", "version"]

    assert f"tinkex {_version.__version__}\n" == subprocess.check_output(command, text=True)


def test_version_prints_the_version(capsys):
    assert 0 == cli.main(["--version"])
    assert f"tinkex, version {_version.__version__}\n" == capsys.readouterr().out


def test_a_closed_pipe_is_not_an_error():
    """`tinkex train --help | head -1`"""
    command = f"{sys.executable} -m tinkex train --help | head -c 1"

    done = subprocess.run(command, shell=True, capture_output=True, text=True)

    assert ("U", "") == (done.stdout, done.stderr)


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["train"], ["train", "--rank", "x"], ["train", "--nonsense"]]
)
def test_wrong_usage_exits_2(arguments, capsys):
    assert 2 == cli.main(arguments)
    assert "" == capsys.readouterr().out


def test_an_error_is_one_line_without_a_traceback(service, capsys):
    def refuses(**_):
        raise errors.AuthenticationError("the key is wrong; set TINKER_API_KEY", status=401)

    service.create_sampling_client = refuses

    assert 1 == cli.main(["sample", "fake", "--prompt", "a"])
    assert "error: the key is wrong; set TINKER_API_KEY\n" == capsys.readouterr().err
    with pytest.raises(errors.AuthenticationError):
        cli.main(["--traceback", "sample", "fake", "--prompt", "a"])


def test_a_command_needs_only_its_module(tmp_path):
    """No list has to be edited: a module of the folder that lists COMMANDS is one."""
    (tmp_path / "greet.py").write_text(
        "import click\n\n\n@click.command()\ndef greet():\n"
        "    'Say hello.'\n    click.echo('hello')\n\n\nCOMMANDS = (greet,)\n"
    )
    code = (
        "import sys, pkgutil; "
        "walk = pkgutil.iter_modules; "
        "pkgutil.iter_modules = lambda path: (path.append(sys.argv[1]), walk(path))[1]; "
        "import tinkex.cli; sys.exit(tinkex.cli.main(['greet']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )

    assert (0, "hello\n", "") == (done.returncode, done.stdout, done.stderr)
