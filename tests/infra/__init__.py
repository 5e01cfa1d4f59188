"""What infra/ ships, checked without a cluster."""
