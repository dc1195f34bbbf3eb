//! The terminal: taken when the page opens, given back however it ends.
//!
//! Given back on the way out of [`Screen`] (an error, a signal that is listened for) and by the hook of a panic, which runs
//! before a release build aborts. SIGKILL leaves it as it is: `reset` helps.

use super::draw::draw;
use super::model::{Key, Model};
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, enable_raw_mode};
use ratatui::{DefaultTerminal, Terminal};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;

/// How often the thread of the keys looks whether the page is closed.
const LOOK: Duration = Duration::from_millis(200);

/// What the terminal says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// A key that means something.
    Key(Key),
    /// It has another size.
    Resized,
}

/// The terminal while the page is open.
pub struct Screen {
    terminal: DefaultTerminal,
    closed: Arc<AtomicBool>,
}

impl Screen {
    /// Takes the terminal over. Keys come over the channel, which ends when the terminal does.
    pub fn open() -> io::Result<(Screen, mpsc::Receiver<Said>)> {
        let (said, keys) = mpsc::channel(32);
        let terminal = match ratatui::try_init() {
            Ok(terminal) => terminal,
            Err(error) => {
                ratatui::restore();
                return Err(error);
            }
        };
        let screen = Screen { terminal, closed: Arc::default() };
        let closed = screen.closed.clone();
        std::thread::Builder::new().name("keys".into()).spawn(move || listen(&said, &closed))?;
        Ok((screen, keys))
    }

    /// Draws the page.
    pub fn draw(&mut self, model: &Model) -> io::Result<()> {
        self.terminal.draw(|frame| draw(frame, model)).map(drop)
    }

    /// Gives the terminal back, stops the process as Ctrl-Z does, and takes it again when it goes on.
    pub fn suspend(&mut self) -> io::Result<()> {
        ratatui::try_restore()?;
        self.terminal.show_cursor()?;
        rustix::process::kill_current_process_group(rustix::process::Signal::TSTP)?;
        enable_raw_mode()?;
        execute!(io::stdout(), EnterAlternateScreen)?;
        // A new one draws every cell. Clearing the old one would ask the terminal for its cursor, and the thread of the
        // keys would get the answer.
        self.terminal = Terminal::new(CrosstermBackend::new(io::stdout()))?;
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
        // A terminal that is gone needs nothing.
        let _ = self.terminal.show_cursor();
        let _ = ratatui::try_restore();
    }
}

fn listen(said: &mpsc::Sender<Said>, closed: &AtomicBool) {
    while !closed.load(Ordering::Relaxed) {
        let event = match event::poll(LOOK) {
            Ok(false) => continue,
            Ok(true) => event::read(),
            Err(error) => Err(error),
        };
        let heard = match event {
            Ok(Event::Key(key)) => of(key).map(Said::Key),
            Ok(Event::Resize(..)) => Some(Said::Resized),
            Ok(_) => None,
            // The terminal is gone: the end of the channel says so.
            Err(_) => return,
        };
        if heard.is_some_and(|heard| said.blocking_send(heard).is_err()) {
            return;
        }
    }
}

/// What a key means.
fn of(key: KeyEvent) -> Option<Key> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    Some(match key.code {
        KeyCode::Char('c') if control => Key::Quit,
        KeyCode::Char('z') if control => Key::Suspend,
        KeyCode::Char(_) if control => return None,
        KeyCode::Char(c) => Key::Char(c),
        KeyCode::Esc => Key::Quit,
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::Home | KeyCode::PageUp => Key::First,
        KeyCode::End | KeyCode::PageDown => Key::Last,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_mean_what_is_printed_on_them() {
        let press = |code, modifiers| of(KeyEvent::new(code, modifiers));
        let (none, control) = (KeyModifiers::NONE, KeyModifiers::CONTROL);
        assert_eq!(press(KeyCode::Char('c'), control), Some(Key::Quit));
        assert_eq!(press(KeyCode::Char('c'), none), Some(Key::Char('c')));
        assert_eq!(press(KeyCode::Char('y'), control), None, "no answer to a question");
        assert_eq!(press(KeyCode::Esc, none), Some(Key::Quit));
        assert_eq!(press(KeyCode::F(1), none), None);
        let released = KeyEvent { kind: KeyEventKind::Release, ..KeyEvent::new(KeyCode::Char('q'), none) };
        assert_eq!(of(released), None);
    }
}
