// Nothing: what an include costs is measured against it.
