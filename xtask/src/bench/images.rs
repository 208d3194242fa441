//! Manifests of many images made from a few common runtimes, for benchmarks with many VMs.

/// Components and what a VM with one of them runs.
const RUNTIMES: [(&str, &str); 4] = [
    ("nginx", "nginx -v"),
    ("redis", "redis-server --version"),
    ("python3", "python3 -c 'import json, http.server'"),
    ("nodejs", "node -e 1"),
];

/// Which runtimes image `number` has: subsets, the large ones first.
pub fn runtimes(number: usize) -> Vec<usize> {
    let subset = 15 - number % 15;
    (0..RUNTIMES.len())
        .filter(|bit| subset >> bit & 1 == 1)
        .collect()
}

/// The manifest of image `number`: profile `image<number>`, ready when its runtimes ran.
pub fn manifest(number: usize, memory_mib: u64) -> String {
    let chosen = runtimes(number);
    let names: Vec<String> = chosen
        .iter()
        .map(|&one| format!("{:?}", RUNTIMES[one].0))
        .collect();
    let runs: Vec<&str> = chosen.iter().map(|&one| RUNTIMES[one].1).collect();
    let script = format!("{}; touch /tmp/ready; exec sleep 100000", runs.join("; "));
    format!(
        "name = \"image{number}\"\nowner = \"demo\"\nbase = \"debian\"\ncomponents = [{}]\n\
         entrypoint = [\"sh\", \"-c\", {script:?}]\nready = {{ path = \"/tmp/ready\" }}\n\
         [vm]\nmemory_mib = {memory_mib}\n\
         [files.\"/srv/own\"]\ncontent = \"file of image {number}\\n\"\n",
        names.join(", ")
    )
}
