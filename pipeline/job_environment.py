"""The environment variables that travel with a job: a list of harmless ones, and those that are asked for.

They are part of the job's description, which everyone with access to the cluster's dashboard reads. So secrets stay
in the cluster's own environment, and what looks like one is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pipeline.errors import ConfigError

PASSED_ON = (  # none of them holds a secret
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "METAPIPE_DEBUG",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_INSECURE_TLS",
    "MLFLOW_TRACKING_URI",
)
SECRET = re.compile(
    r"TOKEN|SECRET|PASS(WORD|WD|PHRASE)|CREDENTIAL|PRIVATE|COOKIE|(^|_)(PWD|AUTH|DSN|SAS)(_|$)|(API|ACCESS)_?KEY|_KEY$",
    re.IGNORECASE,
)
WITH_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s]*:[^/@\s]*@", re.IGNORECASE)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def job_environment(
    given: Iterable[str], surroundings: Mapping[str, str], *, allow_secrets: bool = False
) -> dict[str, str]:
    """What a job's processes get besides the cluster's own environment.

    given: `NAME=VALUE`, or `NAME` with the value from `surroundings` (this process's environment).

    Raises ConfigError: a name that is not set or not a name; one that looks like a secret's, or a value with a
    password in it, unless allow_secrets.
    """
    chosen = {name: surroundings[name] for name in PASSED_ON if surroundings.get(name)}
    for item in given:
        name, equals, value = item.partition("=")
        if not NAME.fullmatch(name):
            raise ConfigError(f"--env {name}: write it as NAME=VALUE, or NAME to pass on the value it has here.")
        if not equals and name not in surroundings:
            raise ConfigError(f"--env {name}: is not set here. Set it, or write --env {name}=VALUE.")
        if SECRET.search(name) and not allow_secrets:
            raise ConfigError(
                f"--env {name}: looks like a secret, and a job's environment can be read in the cluster's dashboard. "
                "Set it in the environment of the cluster's nodes instead (a Kubernetes secret, say), or say "
                "--allow-secrets if everyone with access to the dashboard may know it."
            )
        chosen[name] = value if equals else surroundings[name]
    for name, value in chosen.items():
        if not allow_secrets:
            refuse_password(name, value)
    return chosen


def refuse_password(key: str, value: str) -> None:
    """Raises ConfigError where a value is an address with a password in it."""
    found = WITH_PASSWORD.search(value)
    if found:
        scheme = found.group().partition("://")[0]
        raise ConfigError(
            f"{key}: this {scheme}:// address has a user and a password in it, which everyone with access to the "
            "cluster's dashboard would read. Give the address without them, and set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or the storage's own variables) in the environment of the cluster's nodes."
        )
