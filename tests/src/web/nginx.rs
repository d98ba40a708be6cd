//! Debian's nginx in a pod.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use super::Ended;
use crate::pod::Pod;
use crate::verdict::Failure;
use crate::waiting::eventually;
use crate::world::World;

/// Where Debian puts it; a plain user's `PATH` may lack the directory.
const PROGRAM: &str = "/usr/sbin/nginx";

/// Why nginx cannot be used here, or `None` when it can.
#[must_use]
pub fn nginx_missing() -> Option<String> {
    let found = PathBuf::from(PROGRAM).is_file();
    (!found).then(|| "nginx is not installed: run `cargo xtask setup`".to_owned())
}

/// A running nginx; ends when dropped.
#[derive(Debug)]
pub struct Nginx {
    _process: Ended,
}

impl Nginx {
    /// Start it in a pod with these lines in its `server` block, which listens at `port` by IPv4 and IPv6.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn start(world: &World, pod: &Pod, port: u16, server: &str) -> Result<Self, Failure> {
        let folder = world.directory().join(format!("nginx-{}", pod.name()));
        fs::create_dir_all(folder.join("www"))?;
        fs::write(folder.join("www/hello.txt"), "hello from nginx\n")?;
        let large = vec![b'n'; 4 << 20];
        fs::write(folder.join("www/large.bin"), large)?;
        fs::write(folder.join("www/huge.bin"), vec![b'n'; 64 << 20])?;
        let path = folder.display();
        let log = world.logs().join(format!("nginx-{}.log", pod.name()));
        let log = log.display();
        let configuration = format!(
            "daemon off; worker_processes 1; pid {path}/pid; error_log {log}; user root;
events {{ worker_connections 512; }}
http {{
  access_log off; default_type text/plain; client_max_body_size 64m;
  client_body_temp_path {path}/b; proxy_temp_path {path}/p; fastcgi_temp_path {path}/f;
  uwsgi_temp_path {path}/u; scgi_temp_path {path}/s;
  server {{ listen {port}; listen [::]:{port}; root {path}/www; {server} }}
}}
"
        );
        let file = folder.join("nginx.conf");
        fs::write(&file, configuration)?;
        let mut command = Command::new(PROGRAM);
        command.arg("-c").arg(&file).arg("-p").arg(&folder).arg("-e").arg(folder.join("start.log"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(pod.log_file()?);
        let process = Ended(pod.spawn(command)?);
        let listens = || pod.run(|| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        eventually(Duration::from_secs(10), listens, |listens| matches!(listens, Ok(true)))??;
        Ok(Self { _process: process })
    }
}
