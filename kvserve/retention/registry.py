"""Retentions by the name that YAML files use."""

from __future__ import annotations

from kvserve.part_registry import PartRegistry
from kvserve.retention.base import Retention
from kvserve.retention.compensate import Compensate
from kvserve.retention.demote import Demote
from kvserve.retention.evict import Evict
from kvserve.retention.merge import Merge

RETENTIONS: PartRegistry[Retention] = PartRegistry("retention", Retention, (Compensate, Demote, Evict, Merge))
retention_class = RETENTIONS.class_of
make_retention = RETENTIONS.make
