//! Refusals as gRPC statuses.

use std::collections::{BTreeMap, HashMap};

use prost_types::Any;
use tonic::{Code, Status};
use tonic_prost::prost::{self, Message};

use crate::error::{ACK_IDS_REASON, BrokerError, DOMAIN};

/// `google.rpc.Status`, which carries the details of a gRPC status:
/// <https://cloud.google.com/apis/design/errors#error_model>.
#[derive(Clone, PartialEq, Message)]
#[prost(prost_path = "prost")]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<Any>,
}

/// `google.rpc.ErrorInfo`.
#[derive(Clone, PartialEq, Message)]
#[prost(prost_path = "prost")]
struct ErrorInfo {
    #[prost(string, tag = "1")]
    reason: String,
    #[prost(string, tag = "2")]
    domain: String,
    #[prost(map = "string, string", tag = "3")]
    metadata: HashMap<String, String>,
}

impl From<BrokerError> for Status {
    fn from(error: BrokerError) -> Self {
        let text = error.to_string();
        match error {
            BrokerError::NotFound(_) => Self::not_found(text),
            BrokerError::AlreadyExists(_) => Self::already_exists(text),
            BrokerError::InvalidArgument(_) => Self::invalid_argument(text),
            BrokerError::ResourceExhausted(_) => Self::resource_exhausted(text),
            BrokerError::Unimplemented(_) => Self::unimplemented(text),
            BrokerError::Unavailable(_) => Self::unavailable(text),
            BrokerError::AckIds(failed) => ack_ids(failed, text),
        }
    }
}

fn ack_ids(failed: BTreeMap<String, &'static str>, text: String) -> Status {
    let code = match BrokerError::is_temporary(&failed) {
        true => Code::Unavailable,
        false => Code::InvalidArgument,
    };
    let failed = failed.into_iter();
    let info = ErrorInfo {
        reason: ACK_IDS_REASON.to_owned(),
        domain: DOMAIN.to_owned(),
        metadata: failed.map(|(id, why)| (id, why.to_owned())).collect(),
    };
    let status = RpcStatus {
        code: code.into(),
        message: text.clone(),
        details: vec![Any {
            type_url: "type.googleapis.com/google.rpc.ErrorInfo".to_owned(),
            value: info.encode_to_vec(),
        }],
    };
    Status::with_details(code, text, status.encode_to_vec().into())
}
