"""Key stores: where signing, digest and sealing keys live."""
