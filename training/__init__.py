"""Making FLUXes of the tiny kind from scratch."""
