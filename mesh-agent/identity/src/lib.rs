//! Owns who a workload is: keys, certificates, the CA that issues them, their rotation, and TLS configurations.
