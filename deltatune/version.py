"""The version, in its one place: the package's metadata and every adapter file read it from here."""

VERSION = "0.1.0"
