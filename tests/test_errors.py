"""What can go wrong, as a tree; which may be retried; what is also a builtin."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from tinkex import errors

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, errors.TinkexError)
}


def test_the_tree_in_the_docstring_is_the_tree():
    """The page says: read it and you know what can go wrong."""
    parents = {}
    above = []
    for indent, name in re.findall(r"^( *)(\w+)", errors.__doc__.split("\n\n")[1], re.M):
        depth = len(indent) // 2
        above = [*above[:depth], name]
        parents[name] = above[-2] if depth else None

    assert set(CLASSES) == set(parents)
    for name, parent in parents.items():
        if parent is not None:
            assert CLASSES[parent] in CLASSES[name].__bases__, f"{name} is no {parent}"


@pytest.mark.parametrize(
    "cls, builtin",
    [
        (errors.APITimeoutError, TimeoutError),
        (errors.MissingExtraError, ImportError),
        (errors.TokenizerError, ValueError),
    ],
)
def test_what_people_would_catch_by_guess_is_caught(cls, builtin):
    assert issubclass(cls, builtin)


@pytest.mark.parametrize(
    "status, cls, retryable",
    [
        (400, errors.BadRequestError, False),
        (401, errors.AuthenticationError, False),
        (402, errors.BillingError, False),
        (403, errors.PermissionDeniedError, False),
        (404, errors.NotFoundError, False),
        (405, errors.APIStatusError, False),
        (408, errors.APIStatusError, True),
        (409, errors.ConflictError, False),
        (410, errors.PromiseExpiredError, False),
        (413, errors.APIStatusError, False),
        (418, errors.APIStatusError, False),
        (422, errors.UnprocessableEntityError, False),
        (425, errors.APIStatusError, True),
        (429, errors.RateLimitError, True),
        (500, errors.InternalServerError, True),
        (501, errors.InternalServerError, False),
        (503, errors.InternalServerError, True),
        (599, errors.InternalServerError, True),
        (302, errors.APIStatusError, False),
    ],
)
def test_each_status_has_its_class(status, cls, retryable):
    assert cls is errors.status_error_class(status)
    assert retryable == cls("x", status=status).retryable


@pytest.mark.parametrize("said", [True, False])
def test_the_server_s_word_on_trying_again_wins(said):
    for status in (400, 503):
        assert said == errors.APIStatusError("x", status=status, should_retry=said).retryable


@pytest.mark.parametrize(
    "status, body, category",
    [
        (400, None, "user"),
        (422, {}, "user"),
        (410, None, "user"),
        (408, None, "server"),
        (429, None, "server"),
        (500, None, "server"),
        (500, {"category": "user"}, "user"),
        (400, {"category": "server"}, "server"),
        (400, {"category": "nonsense"}, "user"),
        (400, "text", "user"),
    ],
)
def test_whose_mistake_it_is(status, body, category):
    assert category == errors.APIStatusError("x", status=status, body=body).category


def test_what_came_back_garbled_or_not_at_all_may_be_tried_again():
    assert errors.APIConnectionError("x").retryable
    assert errors.APITimeoutError("x").retryable
    assert errors.APIResponseValidationError("x").retryable
    assert not errors.RequestFailedError("x").retryable
    assert not errors.ClientClosedError("x").retryable
    assert not errors.PriorOperationFailedError("x").retryable


def example(cls):
    request = {"method": "GET", "url": "http://x", "attempts": 3}
    if issubclass(cls, errors.APIStatusError):
        return cls("the message", status=418, detail="why", **request)
    return cls("the message", **request if issubclass(cls, errors.APIError) else {})


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_an_error_travels_between_processes(name):
    """multiprocessing, and every test runner that runs in parallel, pickles exceptions."""
    exc = example(CLASSES[name])
    copy = pickle.loads(pickle.dumps(exc))

    assert type(exc) is type(copy)
    assert str(exc) == str(copy) == "the message"
    assert vars(exc) == vars(copy)


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_says_in_its_docstring_what_it_means(name):
    assert CLASSES[name].__doc__


def test_this_module_knows_nothing_of_the_others():
    assert "from ." not in inspect.getsource(errors)
    assert "import tinkex" not in inspect.getsource(errors)
