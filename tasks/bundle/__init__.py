"""The finished bundle: checksums, bill of materials, signature, OCI image."""
