//! Files read and written by position.

use std::fs::File;
use std::io;

/// Reads until `buffer` is full or the file ends; says how much there was.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match read_some(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Fills `buffer`; a file that ends before is an error.
pub(crate) fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    match read_at(file, buffer, offset)? {
        got if got == buffer.len() => Ok(()),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[cfg(unix)]
fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_some(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, buffer, offset)
}

#[cfg(unix)]
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

#[cfg(windows)]
pub(crate) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match std::os::windows::fs::FileExt::seek_write(file, bytes, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => {
                bytes = &bytes[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_ends_with_the_file_and_an_exact_one_fails_there() {
        let file = tempfile::tempfile().unwrap();
        write_all_at(&file, b"abcdef", 2).unwrap();
        let mut four = [9; 4];
        assert_eq!(read_at(&file, &mut four, 1).unwrap(), 4);
        assert_eq!(&four, b"\0abc");
        assert_eq!(read_at(&file, &mut four, 6).unwrap(), 2);
        assert_eq!(&four[..2], b"ef");
        assert_eq!(read_at(&file, &mut four, 8).unwrap(), 0);
        read_exact_at(&file, &mut four, 4).unwrap();
        assert_eq!(&four, b"cdef");
        let short = read_exact_at(&file, &mut four, 5).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
        read_exact_at(&file, &mut [], 100).unwrap();
    }
}
