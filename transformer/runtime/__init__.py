"""What every part stands on: errors, logging, files, object storage, standard streams, environment."""
