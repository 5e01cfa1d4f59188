"""Distributed meta-learning: raw data → Parquet shards → Ray workers → a registered meta-initialization."""

__version__ = "0.1.0"
