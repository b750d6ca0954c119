"""Exporters: from a pressed model to the form that a target's runtime loads; one module per target that needs one."""
