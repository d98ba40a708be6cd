//! What a test needs from the machine, and what happens when it is not there.

/// Why real-kernel tests cannot run here, or `None` when they can.
#[must_use]
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root for network namespaces and eBPF".to_owned());
    }
    if let Err(error) = crate::cgroup::mount_point() {
        return Some(error.to_string());
    }
    None
}

/// Whether a missing requirement fails the test instead of skipping it (`MESH_TESTS_REQUIRE=1`).
#[must_use]
pub fn is_mandatory() -> bool {
    std::env::var_os("MESH_TESTS_REQUIRE").is_some_and(|value| value == "1")
}

/// Why completion in shells cannot be tried here, or `None` when it can.
#[must_use]
pub fn shells_missing() -> Option<String> {
    let runs = |shell: &str| {
        let ran = std::process::Command::new(shell).args(["-c", "exit 0"]).output();
        ran.is_ok_and(|output| output.status.success())
    };
    let shell = ["bash", "zsh", "fish"].into_iter().find(|shell| !runs(shell))?;
    Some(format!("{shell} is not installed: run `cargo xtask setup`"))
}

/// Leave the test when the machine cannot run it: prints `SKIP reason`, or fails it when
/// `MESH_TESTS_REQUIRE=1`, so that a CI run can never pass by skipping.
#[macro_export]
macro_rules! require_root {
    () => {
        if let Some(reason) = $crate::require::missing() {
            assert!(!$crate::require::is_mandatory(), "MESH_TESTS_REQUIRE=1, but: {reason}");
            eprintln!("SKIP {}: {reason}", $crate::test_name!());
            return Ok(());
        }
    };
}

/// Like [`require_root!`], and the agent's and meshctl's executables must have been built.
#[macro_export]
macro_rules! require_agent {
    () => {
        $crate::require_root!();
        if let Err(reason) = $crate::programs::agent().and($crate::programs::meshctl()) {
            assert!(!$crate::require::is_mandatory(), "MESH_TESTS_REQUIRE=1, but: {reason}");
            eprintln!("SKIP {}: {reason}", $crate::test_name!());
            return Ok(());
        }
    };
}

/// Like [`require_agent!`], and nginx must be installed.
#[macro_export]
macro_rules! require_nginx {
    () => {
        $crate::require_agent!();
        if let Some(reason) = $crate::web::nginx_missing() {
            assert!(!$crate::require::is_mandatory(), "MESH_TESTS_REQUIRE=1, but: {reason}");
            eprintln!("SKIP {}: {reason}", $crate::test_name!());
            return Ok(());
        }
    };
}

/// Like [`require_root!`], and nftables must be installed.
#[macro_export]
macro_rules! require_nft {
    () => {
        $crate::require_root!();
        if let Some(reason) = $crate::translation::nft_missing() {
            assert!(!$crate::require::is_mandatory(), "MESH_TESTS_REQUIRE=1, but: {reason}");
            eprintln!("SKIP {}: {reason}", $crate::test_name!());
            return Ok(());
        }
    };
}

/// Like [`require_agent!`], and the shells that completion is for must be installed.
#[macro_export]
macro_rules! require_shells {
    () => {
        $crate::require_agent!();
        if let Some(reason) = $crate::require::shells_missing() {
            assert!(!$crate::require::is_mandatory(), "MESH_TESTS_REQUIRE=1, but: {reason}");
            eprintln!("SKIP {}: {reason}", $crate::test_name!());
            return Ok(());
        }
    };
}

/// Like [`require_root!`], and Kubernetes' programs must be there.
#[macro_export]
macro_rules! require_api_server {
    () => {
        $crate::require_root!();
        if let Err(reason) = $crate::cluster::Binaries::find() {
            assert!(!$crate::require::is_mandatory(), "MESH_TESTS_REQUIRE=1, but: {reason}");
            eprintln!("SKIP {}: {reason}", $crate::test_name!());
            return Ok(());
        }
    };
}

/// Like [`require_api_server!`] and [`require_agent!`], and the images of `cargo xtask cluster prepare` must be there.
#[macro_export]
macro_rules! require_cluster {
    () => {
        $crate::require_api_server!();
        $crate::require_agent!();
        if let Err(reason) = $crate::cluster::image("pause") {
            assert!(!$crate::require::is_mandatory(), "MESH_TESTS_REQUIRE=1, but: {reason}");
            eprintln!("SKIP {}: {reason}", $crate::test_name!());
            return Ok(());
        }
    };
}

/// The path of the enclosing function without the crate, such as `connect_shapes::reconnects`.
#[macro_export]
macro_rules! test_name {
    () => {{
        fn here() {}
        $crate::require::enclosing(std::any::type_name_of_val(&here))
    }};
}

/// The test's name within a type name that ends in `::here`; only for [`test_name!`].
#[doc(hidden)]
#[must_use]
pub fn enclosing(type_name: &'static str) -> &'static str {
    type_name.trim_end_matches("::here").trim_end_matches("::{{closure}}")
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_test_knows_its_own_name() {
        assert!(test_name!().ends_with("require::tests::a_test_knows_its_own_name"), "{}", test_name!());
    }
}
