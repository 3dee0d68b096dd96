"""Rooms shared by the scripts: see docs/architecture.md."""
