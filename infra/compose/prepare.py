"""Once, before Ray starts: the bucket, and the MLflow user that jobs are. Run again, it changes nothing."""

from __future__ import annotations

import os

import boto3
from mlflow.exceptions import MlflowException


def make_bucket(name: str) -> None:
    """With the endpoint and keys of AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, …"""
    s3 = boto3.client("s3")
    if name not in {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}:
        s3.create_bucket(Bucket=name)


def make_user() -> None:
    """MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD, made by the administrator; never one itself."""
    user, password = os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]
    os.environ["MLFLOW_TRACKING_USERNAME"] = os.environ["MLFLOW_ADMIN_USERNAME"]
    os.environ["MLFLOW_TRACKING_PASSWORD"] = os.environ["MLFLOW_ADMIN_PASSWORD"]
    from mlflow.server.auth.client import AuthServiceClient

    client = AuthServiceClient(os.environ["MLFLOW_TRACKING_URI"])
    try:
        client.create_user(user, password)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        client.update_user_password(user, password)  # .env has the last word


if __name__ == "__main__":
    make_bucket(os.environ["BUCKET"])
    make_user()
    print("the bucket and the user are there")
