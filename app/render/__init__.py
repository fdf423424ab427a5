"""How an answer looks. Bytes become GiB here and nowhere before."""
