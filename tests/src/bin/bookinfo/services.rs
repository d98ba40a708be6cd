//! What each service answers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::header::HeaderMap;
use hyper::{Method, Request, StatusCode};
use mesh_tests::bookinfo::{ERROR_ATTRIBUTE, NO_RATINGS, NO_REVIEWS, VERSION_ATTRIBUTE, WAIT_HEADER};
use serde::{Deserialize, Serialize};

use crate::Kind;
use crate::fetch::{self, FetchError};
use crate::ratings::Ratings;

/// How long the product page waits for the reviews, each of two times; as Bookinfo's does.
const PATIENCE: Duration = Duration::from_secs(3);

/// Longest delay that is made on request.
const DELAY_MAX: Duration = Duration::from_secs(10);

/// One service of one pod.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) kind: Kind,
    pub(crate) pod: String,
    /// Requests answered, without those for the number itself.
    pub(crate) served: AtomicU64,
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) body: String,
}

/// The answer of the details service.
#[derive(Debug, Serialize, Deserialize)]
struct Details {
    id: u32,
    pod: String,
    author: String,
    year: u16,
    pages: u16,
    publisher: String,
}

/// The answer of the reviews service.
#[derive(Debug, Serialize, Deserialize)]
struct Reviews {
    id: u32,
    pod: String,
    version: String,
    reviews: Vec<Review>,
    /// Why there are no ratings although this version shows them.
    error: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Review {
    reviewer: String,
    text: String,
    rating: Option<Rating>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Rating {
    stars: u8,
    color: String,
}

/// The answer of httpbin.
#[derive(Debug, Serialize)]
struct Echo<'a> {
    version: &'a str,
    pod: &'a str,
    host: String,
}

/// Why a service cannot answer.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Call(#[from] FetchError),
    #[error("{host}: unreadable answer")]
    Answer { host: &'static str, source: serde_json::Error },
}

impl Service {
    pub(crate) async fn answer(&self, request: &Request<Incoming>) -> Answer {
        if request.method() != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "GET only\n".into());
        }
        let path = request.uri().path();
        if path == "/health" {
            return plain(StatusCode::OK, "healthy\n".into());
        }
        let mut steps = path.trim_matches('/').split('/');
        let (first, second) = (steps.next().unwrap_or(""), steps.next().unwrap_or("0"));
        if let Some(version) = self.httpbin_version() {
            return self.httpbin(version, first, second, request.headers()).await;
        }
        let id = second.parse::<u32>();
        let Ok(id) = id else { return plain(StatusCode::BAD_REQUEST, "the id is a number\n".into()) };
        let headers = request.headers();
        match (self.kind, first) {
            (Kind::Productpage, "productpage" | "") => self.product_page(id, headers).await,
            (Kind::Details, "details") => json(&self.details(id)),
            (Kind::ReviewsV1 | Kind::ReviewsV2 | Kind::ReviewsV3, "reviews") => {
                self.reviews(id, headers).await
            }
            (Kind::Ratings, "ratings") => json(&Ratings { id, pod: self.pod.clone(), stars: [5, 4] }),
            _ => plain(StatusCode::NOT_FOUND, format!("no {path} here\n")),
        }
    }

    async fn product_page(&self, id: u32, headers: &HeaderMap) -> Answer {
        let (details, reviews) = tokio::join!(
            fetch_json::<Details>("details", format!("/details/{id}"), headers, fetch::LIMIT),
            self.fetch_reviews(id, headers),
        );
        match details {
            Ok(details) => {
                let body = page(&self.pod, &details, reviews.as_ref());
                Answer { status: StatusCode::OK, content_type: "text/html; charset=utf-8", body }
            }
            Err(trouble) => bad_gateway(&trouble),
        }
    }

    /// The reviews, asked for once more when they do not come; a page without them is still a page.
    async fn fetch_reviews(&self, id: u32, headers: &HeaderMap) -> Result<Reviews, String> {
        let asked = headers.get(WAIT_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        let patience = asked.map_or(PATIENCE, Duration::from_millis);
        let ask = || fetch_json::<Reviews>("reviews", format!("/reviews/{id}"), headers, patience);
        match ask().await {
            Ok(reviews) => Ok(reviews),
            Err(_) => ask().await.map_err(|trouble| trouble.chain()),
        }
    }

    fn httpbin_version(&self) -> Option<&'static str> {
        match self.kind {
            Kind::HttpbinV1 => Some("v1"),
            Kind::HttpbinV2 => Some("v2"),
            _ => None,
        }
    }

    /// `/get` says who answers, `/delay/SECONDS` does so later, `/count` says how often that was.
    async fn httpbin(&self, version: &str, first: &str, second: &str, headers: &HeaderMap) -> Answer {
        if first == "count" {
            return json(&self.served.load(Ordering::Relaxed));
        }
        self.served.fetch_add(1, Ordering::Relaxed);
        if first == "delay" {
            let seconds = second.parse::<f64>().ok().and_then(|s| Duration::try_from_secs_f64(s).ok());
            let Some(delay) = seconds else {
                return plain(StatusCode::BAD_REQUEST, "the delay is a number of seconds\n".into());
            };
            tokio::time::sleep(delay.min(DELAY_MAX)).await;
        }
        let host = headers.get("host").map(|host| String::from_utf8_lossy(host.as_bytes()).into_owned());
        json(&Echo { version, pod: &self.pod, host: host.unwrap_or_default() })
    }

    fn details(&self, id: u32) -> Details {
        Details {
            id,
            pod: self.pod.clone(),
            author: "William Shakespeare".into(),
            year: 1595,
            pages: 200,
            publisher: "PublisherA".into(),
        }
    }

    async fn reviews(&self, id: u32, headers: &HeaderMap) -> Answer {
        let (version, color) = match self.kind {
            Kind::ReviewsV2 => ("v2", Some("black")),
            Kind::ReviewsV3 => ("v3", Some("red")),
            _ => ("v1", None),
        };
        let (mut stars, mut error) = (None, None);
        if let Some(color) = color {
            match fetch_json::<Ratings>("ratings", format!("/ratings/{id}"), headers, fetch::LIMIT).await {
                Ok(ratings) => stars = Some((ratings.stars, color)),
                Err(trouble) => error = Some(trouble.chain()),
            }
        }
        let review = |number: usize, text: &str| Review {
            reviewer: format!("Reviewer{}", number + 1),
            text: text.to_owned(),
            rating: stars.map(|(stars, color)| Rating { stars: stars[number], color: color.to_owned() }),
        };
        json(&Reviews {
            id,
            pod: self.pod.clone(),
            version: version.to_owned(),
            error,
            reviews: vec![
                review(0, "An entertaining comedy of mistaken identities; the twins carry it."),
                review(1, "Funny, though the plot asks for patience before it pays off."),
            ],
        })
    }
}

async fn fetch_json<T: for<'de> Deserialize<'de>>(
    host: &'static str,
    path: String,
    headers: &HeaderMap,
    limit: Duration,
) -> Result<T, Trouble> {
    let body = fetch::get(host, &path, headers, limit).await?;
    serde_json::from_slice(&body).map_err(|source| Trouble::Answer { host, source })
}

fn page(pod: &str, details: &Details, reviews: Result<&Reviews, &String>) -> String {
    let reviews = match reviews {
        Ok(reviews) => reviews_part(reviews),
        Err(error) => format!("<h4>Error fetching product reviews</h4>\n{}", sorry(error, NO_REVIEWS)),
    };
    format!(
        "<!DOCTYPE html>\n<title>Simple Bookstore App</title>\n<h3>The Comedy of Errors</h3>\n\
         <h4>Book Details</h4>\n<dl data-details-pod=\"{}\"><dt>Author<dd>{}<dt>Year<dd>{}<dt>Pages<dd>{}\
         <dt>Publisher<dd>{}</dl>\n{reviews}<footer>served by {pod}</footer>\n",
        details.pod, details.author, details.year, details.pages, details.publisher,
    )
}

fn reviews_part(reviews: &Reviews) -> String {
    let rows: String = reviews
        .reviews
        .iter()
        .map(|review| {
            let stars = review.rating.as_ref().map_or_else(String::new, |rating| {
                let stars = "★".repeat(usize::from(rating.stars));
                format!(" <span style=\"color:{}\">{stars}</span>", rating.color)
            });
            format!("<blockquote>{}<br>— {}{stars}</blockquote>\n", review.text, review.reviewer)
        })
        .collect();
    let error = reviews.error.as_ref().map(|error| sorry(error, NO_RATINGS)).unwrap_or_default();
    format!(
        "<h4>Book Reviews</h4>\n<div data-reviews-pod=\"{}\" {VERSION_ATTRIBUTE}{}\">\n{rows}{error}</div>\n",
        reviews.pod, reviews.version,
    )
}

/// What a reader sees of a failure, with its cause in the page.
fn sorry(error: &str, text: &str) -> String {
    let error = error.trim().replace(['"', '<', '>', '&', '\n'], " ");
    format!("<p {ERROR_ATTRIBUTE}{error}\">{text}</p>\n")
}

impl Trouble {
    /// It with its causes, on one line.
    fn chain(&self) -> String {
        match self {
            Self::Call(error) => error.chain(),
            Self::Answer { source, .. } => format!("{self}: {source}"),
        }
    }
}

fn bad_gateway(trouble: &Trouble) -> Answer {
    let text = trouble.chain();
    eprintln!("{text}");
    plain(StatusCode::BAD_GATEWAY, text + "\n")
}

fn plain(status: StatusCode, body: String) -> Answer {
    Answer { status, content_type: "text/plain; charset=utf-8", body }
}

fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(body) => Answer { status: StatusCode::OK, content_type: "application/json", body },
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
