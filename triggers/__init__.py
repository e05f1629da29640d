"""The event sources. Each is one module; a missing extra affects only its own.

    from triggers import Directory, StandardWebhooks, Webhook, env

A name is imported at its first use, so that unused sources cost nothing. How to write another
trigger: docs/guides/write-a-trigger.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from triggers.drift import Drift, DriftAlert
    from triggers.drift_monitor import Categorical, DriftMonitor, Numeric, file_rows
    from triggers.files import Directory, delete, move, outcome
    from triggers.kafka import Kafka, record_headers
    from triggers.kafka_sink import KafkaSink
    from triggers.runs import RunState
    from triggers.s3 import S3, minio_id, minio_object
    from triggers.schedule import At, Cron, Every
    from triggers.signatures import (
        HMAC,
        Bearer,
        GitHub,
        GitLab,
        MLflow,
        Shopify,
        Slack,
        StandardWebhooks,
        Stripe,
        Token,
        env,
    )
    from triggers.webhook import Webhook

_MODULES = {
    "triggers.drift": ("Drift", "DriftAlert"),
    "triggers.drift_monitor": ("Categorical", "DriftMonitor", "Numeric", "file_rows"),
    "triggers.files": ("Directory", "delete", "move", "outcome"),
    "triggers.kafka": ("Kafka", "record_headers"),
    "triggers.kafka_sink": ("KafkaSink",),
    "triggers.runs": ("RunState",),
    "triggers.s3": ("S3", "minio_id", "minio_object"),
    "triggers.schedule": ("At", "Cron", "Every"),
    "triggers.signatures": (
        "HMAC", "Bearer", "GitHub", "GitLab", "MLflow", "Shopify", "Slack", "StandardWebhooks",
        "Stripe", "Token", "env",
    ),
    "triggers.webhook": ("Webhook",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "HMAC",
    "S3",
    "At",
    "Bearer",
    "Categorical",
    "Cron",
    "Directory",
    "Drift",
    "DriftAlert",
    "DriftMonitor",
    "Every",
    "GitHub",
    "GitLab",
    "Kafka",
    "KafkaSink",
    "MLflow",
    "Numeric",
    "RunState",
    "Shopify",
    "Slack",
    "StandardWebhooks",
    "Stripe",
    "Token",
    "Webhook",
    "delete",
    "env",
    "file_rows",
    "minio_id",
    "minio_object",
    "move",
    "outcome",
    "record_headers",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(
            f"module 'triggers' has no attribute {name!r}; it has {', '.join(__all__)}"
        )
    return getattr(import_module(_MODULE_OF[name]), name)
