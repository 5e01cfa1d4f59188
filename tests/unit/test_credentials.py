"""Addresses are shown, stored and compared without the secrets in them."""

import json
import pickle
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline import config, experiment, storage
from pipeline.credentials import Login, login_in, redacted, without_credentials
from pipeline.errors import ConfigError, DataError

SECRET = "hunter2hunter2"


@pytest.mark.parametrize(
    ("address", "clean"),
    [
        ("http://ada:hunter2hunter2@host:5000/x", "http://host:5000/x"),
        ("https://hunter2hunter2@host", "https://host"),  # a token
        ("postgresql://ada:hunter2hunter2@host/db?sslmode=require", "postgresql://host/db?sslmode=require"),
        ("postgresql+psycopg2://host/db?user=ada&password=hunter2hunter2", "postgresql+psycopg2://host/db?user=ada"),
        ("s3://KEY:hunter2/hunter2@bucket/runs", "s3://bucket/runs"),  # / not encoded, as people paste them
        ("s3://bucket/runs?secret_key=hunter2hunter2&region=eu", "s3://bucket/runs?region=eu"),
        ("s3://bucket/runs?region=eu;access_key=hunter2hunter2", "s3://bucket/runs?region=eu"),
        ("https://host/x?X-Amz-Credential=a&X-Amz-Signature=hunter2hunter2#part", "https://host/x#part"),
        ("https://host/x?sig=hunter2hunter2&sv=2024", "https://host/x?sv=2024"),
        ("http://ada:hunter2@hunter2hunter2@host/x", "http://host/x"),
        ("http://ada:hunter2hunter2@[::1]:5000", "http://[::1]:5000"),
    ],
)
def test_secrets_are_left_out(address: str, clean: str) -> None:
    assert without_credentials(address) == clean
    assert without_credentials(clean) == clean
    assert redacted(f"no server at {address}; start one") == f"no server at {clean}; start one"
    assert redacted(f"({address!r})") == f"({clean!r})"


@pytest.mark.parametrize(
    "address",
    [
        "sqlite:////home/ada@work/mlflow.db",
        "runs/omniglot",
        "/data/a:b@c",
        "http://host:5000/users/a@b",
        "http://[::1]:5000/a@b",
        "abfss://container@account.dfs.core.windows.net/runs",
        "gs://anonymous@bucket/data",
        "mysql://host/db?keyspace=a&author=b&charset=utf8",
        "models:/omniglot@champion",
    ],
)
def test_what_holds_no_secret_stays_as_it_is(address: str) -> None:
    assert without_credentials(address) == redacted(address) == address
    assert login_in(address) is None


printable = st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1)


@given(user=printable, password=printable)
@example(user="a b", password="x@/?#:%")
def test_a_login_is_found_whole_and_left_out_whole(user: str, password: str) -> None:
    address = f"http://{quote(user, safe='')}:{quote(password, safe='')}@host:5000/path"
    assert login_in(address) == Login(user, password)
    assert without_credentials(address) == "http://host:5000/path"


@given(password=st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"], exclude_characters="'\"<>`")))
@example(password="@#")
@example(password="@x/")
def test_a_password_that_should_have_been_encoded(password: str) -> None:
    """Marked by letters around, so that what is left of it is seen."""
    secret = f"zq{password}qz"
    assert "qz" not in redacted(f"no answer from postgresql://ada:{secret}@host/db today")


def test_an_address_that_was_taken_for_a_path() -> None:
    assert (
        redacted(f"{Path(f'http://ada:{SECRET}@host/none.yaml')}: no such file") == "http:/host/none.yaml: no such file"
    )
    assert redacted("C:/data/a.yaml and sqlite:/mlflow.db") == "C:/data/a.yaml and sqlite:/mlflow.db"


def test_no_users_error_holds_a_password(tmp_path: Path) -> None:
    address = f"s3://KEY:{SECRET}@bucket/data"
    file = tmp_path / "a.yaml"
    file.write_text(json.dumps({"task": {"family": "images", "data": address}, "tracking": {"runs": address}}))
    attempts = [
        lambda: experiment.load(file),
        lambda: config.apply_overrides({}, [f"task.data {address}"]),
        lambda: storage.location(address),
        lambda: config.validate(config.Section, {"data": address}, source=address),
    ]
    for attempt in attempts:
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert SECRET not in f"{caught.value} {caught.value!r} {caught.value.args}"
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    with pytest.raises(ConfigError, match=r"task\.data: write it as s3://BUCKET/KEY and nothing else.*tracking\.runs"):
        experiment.load(file)


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError(f"http://a:{SECRET}@host: damaged")))
    assert (type(error), str(error)) == (DataError, "http://host: damaged")
