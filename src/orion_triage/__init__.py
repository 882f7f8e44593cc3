"""ORION triage: the ground pipeline of an on-board image triage model."""

__version__ = "0.2.0"
