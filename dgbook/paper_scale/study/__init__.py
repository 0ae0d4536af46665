"""A user study like the paper's (Fig. 17): one HTML page of blinded pairs, and win rates from its answers."""
