#!/bin/sh
# A team's MLflow server: runs, registry and users in PostgreSQL, artifacts in an object store or a folder, basic
# auth on. Settings come from the environment; server.env.example lists them. Whatever a server could not be safe
# without is asked for here, before anything starts.
set -eu

: "${PGHOST:?is not set: the PostgreSQL server}"
: "${PGDATABASE:?is not set: a database of its own for MLflow}"
: "${PGUSER:?is not set: a PostgreSQL user who owns that database}"
: "${PGPASSWORD:?is not set: the password of that user}"
: "${MLFLOW_AUTH_ADMIN_USERNAME:?is not set: the first administrator}"
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?is not set: the first administrator's password, 12 characters or more}"
: "${MLFLOW_FLASK_SERVER_SECRET_KEY:?is not set: 32 random bytes or more, e.g. from openssl rand -hex 32}"
: "${MLFLOW_ARTIFACTS_DESTINATION:?is not set: where artifacts go, e.g. s3://bucket/mlflow}"

here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
export MLFLOW_AUTH_CONFIG_PATH="${MLFLOW_AUTH_CONFIG_PATH:-$here/basic_auth.ini}"
export MLFLOW_BACKEND_STORE_URI="postgresql+psycopg2://" # the rest is in PGHOST …: no password on a command line
export MLFLOW_DISABLE_TELEMETRY=true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false # server-side jobs are for evaluating language models
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false

exec mlflow server --app-name basic-auth \
    --host "${MLFLOW_HOST:-127.0.0.1}" --port "${MLFLOW_PORT:-5000}" --workers "${MLFLOW_WORKERS:-2}"
