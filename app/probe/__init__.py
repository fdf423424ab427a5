"""The probe: the same job on a real GPU, and both books side by side.

`card` looks at the card before anything runs; `child` is the process that measures (`weights`, `recorder`, `trainers`,
`history` are its parts); `recording` is what it leaves; `compare` holds it against the plan; `measure` is the use case.
"""
