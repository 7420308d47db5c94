//! What goes to the standard output. What cannot be printed is an error, not a panic.

use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;

use super::output::NotWritten;

/// Prints text for people. A reader that has gone away (`| head`) is no error.
///
/// # Errors
/// What the system says, such as a full disk.
pub fn text(text: &str) -> Result<()> {
    match line(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => Ok(printed.map_err(not_written)?),
    }
}

/// Prints a line of JSON, for a program that needs it: one that has gone away has not got it.
///
/// # Errors
/// What the system says.
pub fn json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string(value)?;
    Ok(line(&text).map_err(not_written)?)
}

fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

fn not_written(source: io::Error) -> NotWritten {
    NotWritten { path: "the standard output".into(), source }
}
