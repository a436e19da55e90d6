"""What `rto doctor` looks at. A check is a function that returns findings; `gather.py` joins those of all ranks."""
