//! Shards taken apart and put together again, damaged on purpose.

use std::path::Path;

/// The members of a plain tar: names and contents.
pub fn members(tar: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut members = Vec::new();
    let mut at = 0;
    while at + 512 <= tar.len() && tar[at] != 0 {
        let header = &tar[at..at + 512];
        let text = |field: &[u8]| -> String {
            field.iter().take_while(|&&byte| byte != 0 && byte != b' ').map(|&byte| char::from(byte)).collect()
        };
        let size = usize::from_str_radix(&text(&header[124..136]), 8).expect("a size is octal");
        members.push((text(&header[..100]), tar[at + 512..at + 512 + size].to_vec()));
        at += 512 + size.next_multiple_of(512);
    }
    members
}

/// A tar of members, as GNU tar writes it.
pub fn tar(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut tar = Vec::new();
    for (name, content) in members {
        let mut header = [0u8; 512];
        header[..name.len()].copy_from_slice(name.as_bytes());
        header[100..108].copy_from_slice(b"0000644\0");
        header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
        header[136..148].copy_from_slice(b"00000000000\0");
        header[156] = b'0';
        header[257..265].copy_from_slice(b"ustar\x0000");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.extend_from_slice(&header);
        tar.extend_from_slice(content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    tar
}

/// Rewrites a shard: `change` edits its members.
pub fn rewrite(shard: &Path, change: impl FnOnce(&mut Vec<(String, Vec<u8>)>)) {
    let bytes = std::fs::read(shard).expect("the shard can be read");
    let mut members = members(&bytes);
    assert!(!members.is_empty(), "{} has members", shard.display());
    change(&mut members);
    std::fs::write(shard, tar(&members)).expect("the shard can be written");
}
