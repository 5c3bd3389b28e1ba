"""What shows whether a run is well."""
