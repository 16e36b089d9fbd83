"""The judge: measures a version and keeps what it measured as a record, from which every report is made."""
